// The arithmetic, compiled once per instruction set: -DST_ISA=<name> and that set's compiler flags.
#include "adaln.h"
#include "attention.h"
#include "elementwise.h"
#include "features.h"
#include "noise.h"
#include "optimizer.h"
#include "qk_norm.h"

namespace ST_ISA {

extern const Kernels table;
const Kernels table = {
    adaln_forward<false, true>,
    adaln_forward<true, true>,
    adaln_forward<true, false>,
    {adaln_backward<false, true, false>, adaln_backward<false, true, true>},
    {adaln_backward<true, true, false>, adaln_backward<true, true, true>},
    {adaln_backward<true, true, false, true>, adaln_backward<true, true, true, true>},
    {adaln_backward<true, false, false>, adaln_backward<true, false, true>},
    sum_partials,
    feature_loss,
    cfg_extrapolate,
    gelu_tanh,
    gelu_tanh_backward,
    gelu_tanh_bias_backward,
    swiglu,
    swiglu_backward<false>,
    swiglu_backward<true>,
    {{qk_norm<HeadNorm::kLayer, false>, qk_norm<HeadNorm::kLayer, true>},
     {qk_norm<HeadNorm::kRms, false>, qk_norm<HeadNorm::kRms, true>},
     {qk_norm<HeadNorm::kNone, false>, qk_norm<HeadNorm::kNone, true>}},
    {{qk_norm_backward<HeadNorm::kLayer, false>, qk_norm_backward<HeadNorm::kLayer, true>},
     {qk_norm_backward<HeadNorm::kRms, false>, qk_norm_backward<HeadNorm::kRms, true>},
     {qk_norm_backward<HeadNorm::kNone, false>, qk_norm_backward<HeadNorm::kNone, true>}},
    attention,
    attention_backward,
    noisy_latents,
    sum_of_squares,
    adamw_ema,
};

}  // namespace ST_ISA
