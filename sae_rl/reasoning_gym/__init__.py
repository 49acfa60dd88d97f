"""Problems of the reasoning-gym library, drawn in a process of their own."""
