"""What the five scripts share. Run commands from the folder above: python training.py, python -m tools.NAME."""
