"""What every other room stands on: whole files, weights with hashes, the version."""
