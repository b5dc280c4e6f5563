"""What there is to pack: class folders, archives and tables, on this machine or behind a URL."""
