"""What tools/classify.py is made of: nets of any form, pictures, videos, results and how they are drawn."""
