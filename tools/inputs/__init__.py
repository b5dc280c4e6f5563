"""What there is to pack: class folders, archives, tables, here or behind a URL."""
