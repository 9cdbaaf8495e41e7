"""What every other room stands on: whole files, weights with hashes, groups, wording, the version."""
