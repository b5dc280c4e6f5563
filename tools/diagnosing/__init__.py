"""The parts of tools/doctor.py."""
