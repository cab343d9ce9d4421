//! A block by LibTorch's flash attention: the CPU's kernels, which `tch` binds, and CUDA's through a shim.

#![allow(deprecated)] // burn 0.22.1 is pinned as the last release with LibTorch

use std::ffi::{CStr, c_char, c_int};
use std::ptr::null_mut;

use burn_tch::{LibTorch, TchTensor};
use burn_tensor::Tensor;
use tch::Tensor as Torch;
use torch_sys::C_tensor;

/// `[heads, n, x]` to `[1, heads, n, x]`. `x` has to outlive it: other ranks see by the count of burn's references whether
/// they may write into its memory.
fn torch(x: &Tensor<3>) -> Torch {
    let primitive = x.clone().try_into_primitive::<LibTorch>();
    primitive.expect("the flash kernel is used on LibTorch's devices").tensor.unsqueeze(0)
}

fn burn(x: Torch) -> Tensor<3> {
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

/// What a shim's call put into `out`. A failure is the device's or a bug here: it ends the rank, as in `tch`'s own calls.
fn taken<const N: usize>(code: c_int, out: [*mut C_tensor; N]) -> [Torch; N] {
    // Safety: the message lives until this thread's next call
    assert!(code == 0, "flash attention: {}", unsafe { CStr::from_ptr(lw_flash_error()) }.to_string_lossy());
    // Safety: the shim gave them away
    out.map(|pointer| unsafe { Torch::from_ptr(pointer) })
}

/// As [`Kernel::forward`](super::Kernel::forward).
pub fn forward(q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>, causal: bool) -> (Tensor<3>, Tensor<3>) {
    let (q, k, v) = (torch(q), torch(k), torch(v));
    if q.device().is_cuda() {
        let mut out = [null_mut(); 2];
        // Safety: the tensors live until the call returns
        let code = unsafe {
            lw_flash_forward(pointer(&q), pointer(&k), pointer(&v), causal.into(), out.as_mut_ptr())
        };
        let [out, lse] = taken(code, out);
        return (burn(out), burn(lse.unsqueeze(-1)));
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
    (burn(out), burn(lse.unsqueeze(-1)))
}

/// As [`Kernel::backward`](super::Kernel::backward).
pub fn backward(
    dout: &Tensor<3>,
    [q, k, v]: &[Tensor<3>; 3],
    out: &Tensor<3>,
    lse: &Tensor<3>,
    causal: bool,
) -> [Tensor<3>; 3] {
    let (dout, q, k, v, out) = (torch(dout), torch(q), torch(k), torch(v), torch(out));
    let lse = torch(lse).squeeze_dim(-1);
    if q.device().is_cuda() {
        let lse = lse.contiguous();
        let mut grads = [null_mut(); 3];
        let [a, b, c, d, e, f] = [&dout, &q, &k, &v, &out, &lse].map(pointer);
        // Safety: the tensors live until the call returns
        let code = unsafe { lw_flash_backward(a, b, c, d, e, f, causal.into(), grads.as_mut_ptr()) };
        return taken(code, grads).map(burn);
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
    [burn(dq), burn(dk), burn(dv)]
}
