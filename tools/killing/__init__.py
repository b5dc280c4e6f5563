"""What tools/chaos.py is made of: lives that are killed, the runs they make up, and what must hold."""
