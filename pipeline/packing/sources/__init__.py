"""Find the images to pack, in class folders, archives and tables on this machine or behind a URL."""
