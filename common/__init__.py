"""What every other room stands on: whole files, weights with hashes, groups, the sampler, wording, the version."""
