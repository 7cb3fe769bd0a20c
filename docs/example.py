"""st_fast as a library: a SiT, one step of stage 2 by hand, and samples, on any CPU in seconds.

The cells (# %%) run one by one in a notebook or an editor; `python docs/example.py` runs them all.
"""

# %% A model. `select` picks for each op what is fastest on the device.
import tempfile
from pathlib import Path

import torch

from st_fast.kernels import guided_feature_loss, select
from st_fast.model import SiT, build, flow
from st_fast.recipe.schema import Model, Sample
from st_fast.sample.draw import balanced
from st_fast.sample.guided import sample

device = torch.device("cpu")
config = Model(depth=4, width=64, heads=4, patch=2, channels=4, latent_size=8, num_classes=10)
student, teacher = (build(config, select({}, device), seed) for seed in (0, 1))

# %% Latents on their way to noise: t = 0 is data, t = 1 is noise.
x, labels, t = torch.randn(16, 4, 8, 8), torch.arange(16) % 10, torch.rand(16)
x_t, velocity = flow.interpolate(x, torch.randn_like(x), t, "linear")

# %% One step: the velocity, and block 2 towards the teacher's guided block 3. (Training has a projection between.)
with torch.no_grad():
    conditional, unconditional = teacher.guided_features(x_t, t, labels, depth=3)
prediction, hidden = student(x_t, t, labels, tap=2)
denoise = flow.denoising_loss(prediction, velocity).mean()
aux = guided_feature_loss(hidden, conditional, unconditional, torch.full((16,), 1 / 16), cfg_scale=30.0, loss="cosine")
(denoise + 0.5 * aux).backward()
torch.optim.AdamW(student.parameters(), lr=1e-3).step()

# %% Samples, one of each class, the same whatever the batch: noise follows from (seed, sample number).
settings = Sample(sampler="heun", steps=8, cfg_scale=2.0)
latents = sample(student.eval(), balanced(seed=0, first=0, count=10, num_classes=10, device=device), settings, "linear")

# %% A folder for other programs and the hub, and back: config.json and model.safetensors.
folder = Path(tempfile.mkdtemp()) / "student"
student.save_pretrained(folder)
again = SiT.from_pretrained(folder)
print(f"denoise {denoise:.3f}, aux {aux:.3f}, latents {tuple(latents.shape)}")
