//! A block of attention by LibTorch's flash attention kernels. `tch` binds those for CPUs; a shim binds those for CUDA.

#![allow(deprecated)] // burn 0.22.1 is pinned as the last release with LibTorch

use std::ffi::{CStr, c_char, c_int};
use std::ptr::null_mut;

use burn_tch::{LibTorch, TchTensor};
use burn_tensor::Tensor;
use tch::Tensor as Torch;
use torch_sys::C_tensor;

/// From `[heads, n, x]` to `[1, heads, n, x]`. `x` has to outlive the result: burn's reference count tells other ranks
/// whether they may write into its memory.
fn to_torch(x: &Tensor<3>) -> Torch {
    let primitive = x.clone().try_into_primitive::<LibTorch>();
    primitive.expect("the flash kernel is used on LibTorch's devices").tensor.unsqueeze(0)
}

fn from_torch(x: Torch) -> Tensor<3> {
    Tensor::from_primitive::<LibTorch>(TchTensor::new(x.squeeze_dim(0)))
}

type Pointer = *mut std::ffi::c_void;

unsafe extern "C" {
    fn lw_flash_error() -> *const c_char;
    fn lw_flash_forward(q: Pointer, k: Pointer, v: Pointer, causal: c_int, out: *mut *mut C_tensor) -> c_int;
    fn lw_flash_backward(
        dout: Pointer,
        q: Pointer,
        k: Pointer,
        v: Pointer,
        attention: Pointer,
        lse: Pointer,
        causal: c_int,
        out: *mut *mut C_tensor,
    ) -> c_int;
}

fn pointer(tensor: &Torch) -> Pointer {
    tensor.as_ptr().cast_mut().cast()
}

/// The tensors that a call of the shim returned. A failure is a fault of the device or a bug here, so it panics, as `tch`'s
/// own calls do.
fn checked_outputs<const N: usize>(code: c_int, out: [*mut C_tensor; N]) -> [Torch; N] {
    // Safety: the message lives until this thread's next call
    assert!(code == 0, "flash attention: {}", unsafe { CStr::from_ptr(lw_flash_error()) }.to_string_lossy());
    // Safety: the shim passed on ownership
    out.map(|pointer| unsafe { Torch::from_ptr(pointer) })
}

/// As [`Kernel::forward`](super::Kernel::forward).
pub fn forward(q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>, causal: bool) -> (Tensor<3>, Tensor<3>) {
    let (q, k, v) = (to_torch(q), to_torch(k), to_torch(v));
    if q.device().is_cuda() {
        let mut out = [null_mut(); 2];
        // Safety: the tensors live until the call returns
        let code = unsafe {
            lw_flash_forward(pointer(&q), pointer(&k), pointer(&v), causal.into(), out.as_mut_ptr())
        };
        let [out, lse] = checked_outputs(code, out);
        return (from_torch(out), from_torch(lse.unsqueeze(-1)));
    }
    let (out, lse) = Torch::internal_scaled_dot_product_flash_attention_for_cpu(
        &q,
        &k,
        &v,
        0.0,
        causal,
        None::<Torch>,
        None,
    );
    (from_torch(out), from_torch(lse.unsqueeze(-1)))
}

/// As [`Kernel::backward`](super::Kernel::backward).
pub fn backward(
    dout: &Tensor<3>,
    [q, k, v]: &[Tensor<3>; 3],
    out: &Tensor<3>,
    lse: &Tensor<3>,
    causal: bool,
) -> [Tensor<3>; 3] {
    let (dout, q, k, v, out) = (to_torch(dout), to_torch(q), to_torch(k), to_torch(v), to_torch(out));
    let lse = to_torch(lse).squeeze_dim(-1);
    if q.device().is_cuda() {
        let lse = lse.contiguous();
        let mut grads = [null_mut(); 3];
        let [a, b, c, d, e, f] = [&dout, &q, &k, &v, &out, &lse].map(pointer);
        // Safety: the tensors live until the call returns
        let code = unsafe { lw_flash_backward(a, b, c, d, e, f, causal.into(), grads.as_mut_ptr()) };
        return checked_outputs(code, grads).map(from_torch);
    }
    let (dq, dk, dv) = Torch::internal_scaled_dot_product_flash_attention_for_cpu_backward(
        &dout,
        &q,
        &k,
        &v,
        &out,
        &lse,
        0.0,
        causal,
        None::<Torch>,
        None,
    );
    [from_torch(dq), from_torch(dk), from_torch(dv)]
}
