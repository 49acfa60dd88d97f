"""The kinds of sources of prompts, one file each: how a source is configured, and how it loads its prompts."""
