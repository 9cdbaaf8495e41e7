"""What a head-CT scan is: reading, windows, brain mask, standard frame, writing. No model in here."""
