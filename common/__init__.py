"""What all other packages use: whole files, weights with hashes, groups, the sampler, wording, the version."""
