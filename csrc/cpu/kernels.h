// What the tensor side (op_*.cpp, compiled once) and the arithmetic (kernels_isa.cpp, compiled once per
// instruction set) say to one another: plain structs of pointers, and one table of functions.
// Every kernel works on a range of tasks. What a task is depends on sizes only, never on threads, and
// sums are kept per task, so that a result is the same whatever the number of threads.
#pragma once

#include <cstdint>

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t kTokensPerTask = 32;
constexpr int64_t kLine = 64;                // bytes of a cache line, and of the widest vector
constexpr int64_t kPastCacheBytes = 1 << 20;  // a result from here on is not kept in a core's own caches anyway
constexpr int64_t kElementsPerTask = 16384;  // elementwise passes, norms and the optimiser
constexpr int64_t kNumbersPerTask = 1024;    // of a noisy latent
constexpr uint32_t kNoise = 1, kPosterior = 2;  // what a draw is for: the last word of its counter

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A (B, N, D) tensor, or a (B, D) one with token = 0; of a modulation (B, G, D) token is the run's. Strides in elements.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, token = 0, channel = 1;
  bool past_cache = false;  // an output that no cache holds: float32, every row a whole number of lines
};

// A task's tokens, of one run of those that share a modulation vector.
struct Chunk {
  int64_t run, first, last;
};

// Tasks: (sample, chunk). Absent tensors have data == nullptr and are not touched.
struct AdaLN {
  int64_t B, N, D;
  int64_t runs, chunks;      // of a sample
  const Chunk* chunk;        // (chunks,)
  const int64_t* chunk_end;  // (runs,): the number of chunks up to the end of a run
  bool per_token;            // every token has its vectors, the token stride of gate, shift and scale; one run
  float eps;
  Rows x, a, gate, shift, scale, x_out, y;  // forward; x_out is also read by the backward pass
  Rows dx_out, dy, dx, da;                  // backward
  float *mean, *rstd;                       // (B, N); mean == nullptr: RMSNorm, which has none
  float* partial;                           // (B, chunks, sums, D), sums in the order gate, shift, scale
  Rows dmod;                                // (B, runs, sums · D); per token (B, N, sums · D), and no partial
  int64_t sums;
  float* bias_partial;                      // (tasks, D): sums of da
};

enum class FeatureLoss : int { kMse, kCosine, kNormalizedMse };

// Tasks: (row b of q, kTokensPerTask tokens).
struct Feature {
  int64_t B, N, D;
  FeatureLoss loss;
  float cfg_scale;
  Rows q, cond, null, dq;    // null.data == nullptr: the target is cond itself
  const int64_t* sample_of;  // (B,): which m supervises row b, or -1
  const float* weight;       // (M,)
  double* partial;           // one per task: its weighted share of the loss
};

struct Heads {  // (B, H, N, d)
  Rows rows;    // batch and token strides
  int64_t head = 0;
};

enum class HeadNorm : int { kLayer, kRms, kNone };

// Tasks: (sample, kTokensPerTask tokens), all heads.
struct QKNorm {
  int64_t B, N, H, d;
  int64_t affine;           // vectors (d,) that get a gradient: 4 of LayerNorm, 2 of RMSNorm, 0 without weights
  float eps;
  Heads in[3], out[3];      // the parts of qkv (backward: of dqkv, written), and q, k, v (backward: their gradients)
  Heads x[3];               // backward: the parts of qkv
  Rows weight[2], bias[2];  // of q and k, (d,); absent: 1 and 0
  Rows rope;                // (B, N, d), float32: d/2 cosines and then sines of a token; may be absent
  float* stats;             // (4, B, N, H): mean_q, rstd_q, mean_k, rstd_k; RMSNorm (2, B, N, H): rstd_q, rstd_k
  float* partial;           // (tasks, sums, d): those of the vectors, then, if wanted, 3·H of dqkv
  int64_t sums;
};

// Consecutive tokens that attend to one another alone.
struct TokenGroup {
  int64_t first, length;
};

// Tasks: (sample, head, group). All float32 with contiguous channels; d is a multiple of 32.
struct Attention {
  int64_t B, N, H, d;
  float scale;
  const TokenGroup* group;
  int64_t groups, longest;  // tokens of the longest one
  Heads in[3], grads[3];  // q, k, v and their gradients
  float *out, *dout;      // (B, N, H, d), contiguous
  float* lse;         // (B, H, N): the logarithm of the sum of e^(scale · score)
};

// Tasks: kElementsPerTask elements of contiguous tensors of one shape; with sums, kTokensPerTask rows of D elements.
// swiglu: kTokensPerTask rows of D elements, of which `count` are; in[0] is h, of rows twice as wide, in[1] dy.
struct Elementwise {
  int64_t count;
  float scalar;
  Rows in[2], out;
  int64_t D = 0;
  float* bias_partial = nullptr;  // (tasks, D or, of swiglu, 2D): sums of out
};

// Tasks: (sample, kNumbersPerTask of its `count` numbers).
struct NoisyLatents {
  int64_t count;
  uint64_t key;
  float scale;
  bool cosine;
  Rows moments;  // contiguous: count means, then as many standard deviations
  const int64_t* ordinals;
  const float* t;
  int64_t ordinal_stride, t_stride;
  float *x, *x_t, *velocity, *noise;  // contiguous
};

struct AdamW {
  float one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, bias2_sqrt, clip, ema_weight;
};

struct ParamBlock {  // one task: up to kElementsPerTask elements of one parameter
  int64_t count;
  float *param, *exp_avg, *exp_avg_sq, *ema;  // ema may be nullptr
  const void* grad;
  void* copy;  // may be nullptr
  DType grad_dtype, copy_dtype;
};

struct Kernels {
  void (*norm_modulate)(const AdaLN&, int64_t, int64_t);
  void (*gate_residual_norm_modulate)(const AdaLN&, int64_t, int64_t);
  void (*gate_residual)(const AdaLN&, int64_t, int64_t);
  void (*norm_modulate_backward[2])(const AdaLN&, int64_t, int64_t);  // the second: per token
  void (*gate_residual_norm_modulate_backward[2])(const AdaLN&, int64_t, int64_t);
  void (*gate_residual_norm_modulate_bias_backward[2])(const AdaLN&, int64_t, int64_t);
  void (*gate_residual_backward[2])(const AdaLN&, int64_t, int64_t);
  void (*sum_partials)(const AdaLN&, int64_t, int64_t);  // tasks: (sample, sum)
  void (*feature_loss)(const Feature&, int64_t, int64_t);
  void (*cfg_extrapolate)(const Elementwise&, int64_t, int64_t);
  void (*gelu_tanh)(const Elementwise&, int64_t, int64_t);
  void (*gelu_tanh_backward)(const Elementwise&, int64_t, int64_t);
  void (*gelu_tanh_bias_backward)(const Elementwise&, int64_t, int64_t);
  void (*swiglu)(const Elementwise&, int64_t, int64_t);
  void (*swiglu_backward)(const Elementwise&, int64_t, int64_t);
  void (*swiglu_bias_backward)(const Elementwise&, int64_t, int64_t);
  void (*qk_norm[3][2])(const QKNorm&, int64_t, int64_t);  // by HeadNorm; the second: with rope
  void (*qk_norm_backward[3][2])(const QKNorm&, int64_t, int64_t);
  void (*attention)(const Attention&, int64_t, int64_t);
  void (*attention_backward)(const Attention&, int64_t, int64_t);
  void (*noisy_latents)(const NoisyLatents&, int64_t, int64_t);
  double (*sum_of_squares)(const void*, DType, int64_t);
  void (*adamw_ema)(const AdamW&, const ParamBlock&);
};

// The table for this machine, or for ST_FAST_ISA = avx512 | avx2 | baseline. Raises std::runtime_error for an
// instruction set that the machine or the build lacks.
const Kernels& kernels();
const char* isa_name();
