// st_fast::noisy_latents on the CPU.
#include "tensors.h"

namespace st_fast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> noisy_latents(const Tensor& moments, const Tensor& ordinals,
                                                         const Tensor& t, int64_t seed, double scale,
                                                         std::string path) {
  check(moments.dim() == 4 && moments.size(1) % 2 == 0, "moments: expected (B, 2C, H, W), got ", moments.dim(),
        " dimensions and ", moments.dim() > 1 ? moments.size(1) : 0, " channels");
  check(path == "linear" || path == "cosine", "path = '", path, "': one of linear, cosine");
  const int64_t B = moments.size(0), C = moments.size(1) / 2, H = moments.size(2), W = moments.size(3);
  expect_shape(ordinals, "ordinals", {B});
  expect_shape(t, "t", {B});
  check(dtype_code(ordinals.get()) == aoti_torch_dtype_int64(), "ordinals: dtype must be int64");
  check(is_float32(t), "t: dtype must be float32");
  const Tensor packed = moments.is_contiguous() ? moments : torch::stable::contiguous(moments);
  Tensor made[4];
  for (Tensor& one : made) one = empty({B, C, H, W}, aoti_torch_dtype_float32());
  NoisyLatents p = {};
  p.count = C * H * W;
  p.key = static_cast<uint64_t>(seed);
  p.scale = static_cast<float>(scale);
  p.cosine = path == "cosine";
  p.moments.data = packed.data_ptr();
  p.moments.dtype = dtype_of(packed, "moments");
  p.moments.batch = 2 * p.count;
  p.moments.token = 1;
  p.ordinals = static_cast<const int64_t*>(ordinals.data_ptr());
  p.t = floats(t);
  p.ordinal_stride = ordinals.stride(0);
  p.t_stride = t.stride(0);
  p.x = floats(made[0]);
  p.x_t = floats(made[1]);
  p.velocity = floats(made[2]);
  p.noise = floats(made[3]);
  // A number takes about eight times as long as an element of the other passes.
  run(kernels().noisy_latents, p, B * divide_up(p.count, kNumbersPerTask), 8 * kNumbersPerTask);
  return {made[0], made[1], made[2], made[3]};
}

}  // namespace

ST_LIBRARY(CPU, m) { ST_IMPL(m, noisy_latents); }

}  // namespace st_fast
