// A shim for the CUDA functions that tch 0.22 does not bind, such as flash attention, whose schema returns SymInt. Tensors
// are passed as at::Tensor*. Functions return 0, or 1 with a message in lw_flash_error. The caller owns the tensors in `out`.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <cstdlib>
#include <string>

using at::Tensor;

static thread_local std::string error;

extern "C" {
const char* lw_flash_error() { return error.c_str(); }

// Selects deterministic kernels, here and in cuBLAS, which reads its variable when it is first used.
void lw_deterministic() {
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
  at::globalContext().setDeterministicAlgorithms(true, false);
}

// The peak of allocated bytes on this GPU, or -1 if it is unknown.
int64_t lw_cuda_peak(int device) {
  try {
    auto stats = c10::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    return stats.allocated_bytes[0].peak; // [0] is the sum over all pools
  } catch (const std::exception&) {
    return -1;
  }
}

// out: attention and log-sum-exp.
int lw_flash_forward(Tensor* q, Tensor* k, Tensor* v, int causal, Tensor** out) {
  try {
    auto r = at::_scaled_dot_product_flash_attention(*q, *k, *v, 0.0, causal, false, std::nullopt);
    out[0] = new Tensor(std::get<0>(r));
    out[1] = new Tensor(std::get<1>(r));
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}

// out: the gradients of q, k and v.
int lw_flash_backward(Tensor* dout, Tensor* q, Tensor* k, Tensor* v, Tensor* attention, Tensor* lse, int causal, Tensor** out) {
  try {
    auto seed = at::empty({2}, at::TensorOptions().dtype(at::kUInt64).device(q->device()));
    auto unused = at::empty({}, at::TensorOptions().dtype(at::kUInt64).device(q->device()));
    auto r = at::_scaled_dot_product_flash_attention_backward(
        *dout, *q, *k, *v, *attention, *lse, Tensor(), Tensor(), q->size(2), k->size(2), 0.0, causal, seed, unused, std::nullopt);
    out[0] = new Tensor(std::get<0>(r));
    out[1] = new Tensor(std::get<1>(r));
    out[2] = new Tensor(std::get<2>(r));
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
}
}
