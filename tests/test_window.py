from __future__ import annotations

import numpy as np
import pytest
import torch

from ct.window import WINDOWS_HU, decode, encode


def _rows(values, dtype=np.float32):
    return np.asarray(values, dtype=dtype).reshape(1, -1)


def _through_8bit(x):
    return np.rint((x + 1) * 127.5).astype(np.uint8) / np.float32(127.5) - 1


def test_encode_hand_computed():
    x = encode(_rows([-20, 0, 30, 55, 80, 180, -1000, 3000]))
    assert x.shape == (3, 1, 8)
    np.testing.assert_allclose(x[0, 0], [-1, -1, 0, 1, 1, 1, -1, 1], atol=1e-6)
    np.testing.assert_allclose(x[1, 0], [-1, -1, -0.25, 0.375, 1, 1, -1, 1], atol=1e-6)
    np.testing.assert_allclose(x[2, 0], [-1, -0.8, -0.5, -0.25, 0, 1, -1, 1], atol=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip_is_exact(backend, dtype):
    hu = np.linspace(-20, 180, 20001).astype(dtype).reshape(3, 59, 113)
    if backend == "torch":
        back = decode(encode(torch.from_numpy(hu)))
        assert back.dtype == getattr(torch, dtype)
        back = back.numpy()
    else:
        back = decode(encode(hu))
        assert back.dtype == dtype
    assert back.shape == hu.shape
    assert np.abs(back - hu).max() < 1e-3


def test_8bit_round_trip_stays_within_half_a_step_of_the_finest_covering_window():
    hu = _rows(np.concatenate([np.linspace(-20, 180, 20001), [-20, 0, 5, 55, 80, 180]]))
    # open intervals: 80 HU itself is the same 8-bit picture as 80.7 HU (127.5 rounds to 128)
    width = np.select([(low < hu) & (hu < high) for low, high in WINDOWS_HU],
                      [high - low for low, high in WINDOWS_HU], default=200)
    error = np.abs(decode(_through_8bit(encode(hu))) - hu)
    assert (error <= width / 255 / 2 + 1e-3).all()


def test_clipped_channels_are_not_counted():
    """The released code counted clipped channels twice: 56 HU read 73.9 and 81 HU read 139."""
    np.testing.assert_allclose(decode(encode(_rows([56, 81])))[0], [56, 81], atol=1e-3)


def test_all_channels_clipped_read_the_outermost_bound():
    assert decode(encode(_rows([-1000, 3000])))[0].tolist() == [-20, 180]
    assert decode(np.full((3, 1, 1), 1.7, np.float32)).item() == 180         # a generator overshoots


def test_finest_unclipped_channel_wins_and_clipped_ones_bound():
    x = np.array([[0.0, 0.2, 0.1], [1.0, 0.5, 0.1], [1.0, 0.0, 0.1], [-1.0, -1.0, 0.1]], np.float32)
    hu = decode(x[..., None, None])[:, 0, 0]
    # 30 by 5..55; that clipped, 60 by 0..80; 0..80 says 40 but 5..55 says >= 55; -20..180 says 90 but <= 0
    np.testing.assert_allclose(hu, [30, 60, 55, 0], atol=1e-4)


def test_decode_is_continuous_where_a_channel_starts_to_clip():
    fine = np.linspace(0.98, 1.02, 4001, dtype=np.float64)
    x = np.stack([fine, np.full_like(fine, 0.5), np.full_like(fine, -0.1)])[:, None]     # 5..55's end, 60, 70
    hu = decode(x)[0]
    assert hu[0] == pytest.approx(54.5) and hu[-1] == pytest.approx(60)
    assert np.abs(np.diff(hu)).max() < 0.01


def test_gradients_flow_and_dtypes_are_kept():
    hu = torch.tensor([[10.0, 40.0, 70.0, 120.0]], dtype=torch.float64, requires_grad=True)
    decode(encode(hu)).sum().backward()
    torch.testing.assert_close(hu.grad, torch.ones_like(hu))
    assert encode(torch.zeros(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert encode(np.zeros((2, 2), np.int16)).dtype == np.float32
    assert encode(torch.zeros(2, 2, dtype=torch.int16)).dtype == torch.float32


def test_decode_refuses_other_channel_counts():
    with pytest.raises(ValueError, match=r"expected channels \[..., 3, H, W\], got \(1, 8, 8\)"):
        decode(np.zeros((1, 8, 8), np.float32))
