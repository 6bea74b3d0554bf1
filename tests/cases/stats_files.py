"""Reference statistics as other tools write them."""

import pickle

import numpy as np
import torch
from common import TMP, case, raised

from flowmaps.metrics import FeatureStats

rng = np.random.default_rng(0)
f = (np.abs(rng.normal(size=(1000, 2048))) * 0.4).astype(np.float32)
f[:, :8] = rng.random(8)  # eight features never change
t, mu, s = torch.from_numpy(f).double(), torch.zeros(2048).double(), torch.zeros(2048, 2048).double()
for part in torch.split(t, 64):
    mu += part.sum(0)
    s += part.T @ part  # sums, as EDM's fid.py and torchmetrics keep them
n = len(t)
mu /= n
s = (s - n * mu.outer(mu)) / (n - 1)
mu, s = mu.numpy(), s.numpy()
np.savez(TMP / "sums.npz", mu=mu, sigma=s)
e, _ = raised(lambda: FeatureStats.load(TMP / "sums.npz"))
case(f"a variance of {s.diagonal().min():.0e} is rounding", e is None, str(e)[-90:])
np.savez(TMP / "f32.npz", mu=mu.astype(np.float32), sigma=np.cov(f, rowvar=False).astype(np.float32))
e, _ = raised(lambda: FeatureStats.load(TMP / "f32.npz"))
case("float32 moments", e is None)
for protocol in (4, 5):
    (TMP / "r.pkl").write_bytes(
        pickle.dumps({"fid": {"mu": mu, "sigma": np.cov(f.astype(float), rowvar=False)}}, protocol)
    )
    e, _ = raised(lambda: FeatureStats.load(TMP / "r.pkl"))
    case(f"EDM2's .pkl in pickle protocol {protocol}", e is None, str(e)[-110:])
