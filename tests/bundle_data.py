"""What the tests of model bundles need: small networks, a bundle of them, and what they put out."""

import torch

from detect.bundle import load_bundle, save_bundle
from detect.latent import LatentStats
from detect.search import Search, SearchSettings
from detect.settings import Settings
from model import Discriminator, Encoder, Generator, ModelConfig

TINY = ModelConfig(size=32, style_dim=8, n_mlp=2, channel_base=128, channel_max=16)
META = dict(preprocessing={"size": 32}, calibration=None, provenance={"data": "phantoms"})


def networks(config=TINY, seed=0):
    torch.manual_seed(seed)
    parts = Generator(config), Discriminator(config), Encoder(config)
    for part in parts:                                     # zeros at the start would hide a weight that is not loaded
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return tuple(part.eval() for part in parts)


def latent_stats(config=TINY):
    codes = torch.randn(60, config.n_latent, config.style_dim, generator=torch.Generator().manual_seed(0))
    return LatentStats.fit(codes, torch.zeros(60), [0.0, 5.0], components=3, min_codes=32, max_reach_mm=20.0)


def save(folder, parts, latent, meta=META, **options):
    """A bundle of the published search, which uses all files."""
    generator, discriminator, encoder = parts
    search = Search(SearchSettings(), generator, encoder, latent, discriminator)
    return save_bundle(folder, search, Settings("search"), meta, **options)


def load(folder):
    """The search of a bundle, in float32."""
    return load_bundle(folder, precision="fp32").reconstructor


def outputs(generator, discriminator, encoder):
    rng = torch.Generator().manual_seed(1)
    w_plus = torch.randn(2, generator.config.n_latent, generator.config.style_dim, generator=rng)
    images = torch.randn(2, 3, generator.config.size, generator.config.size, generator=rng)
    with torch.no_grad():
        return generator.synthesis(w_plus, noise="const"), discriminator(images), encoder(images)
