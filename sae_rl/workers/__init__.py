"""The Ray processes and the driver's handles on them. Ray lives only here."""
