//! Devices by name: the one place that knows which backends this build has.

use burn_tensor::{Device, FloatDType};

use crate::attention::Kernel;
use crate::{Error, Result};

/// What `[train] devices` may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Name {
    /// Pure Rust, on the CPU.
    Flex,
    /// LibTorch on the CPU.
    LibtorchCpu,
    /// LibTorch on a GPU.
    LibtorchCuda(usize),
}

impl Name {
    /// # Errors
    /// There is no such device.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "flex" => return Ok(Self::Flex),
            "libtorch-cpu" => return Ok(Self::LibtorchCpu),
            _ => {}
        }
        let gpu = name.strip_prefix("libtorch-cuda:").and_then(|i| i.parse().ok());
        gpu.map(Self::LibtorchCuda).ok_or_else(|| {
            Error::Conf(format!(
                "there is no device `{name}`; there are \"flex\", \"libtorch-cpu\" and \"libtorch-cuda:0\", …"
            ))
        })
    }

    /// Devices of this build that compute on this machine, its first GPU among them.
    #[cfg(test)]
    pub fn at_hand() -> Vec<Self> {
        let names = [Self::Flex, Self::LibtorchCpu, Self::LibtorchCuda(0)];
        names.into_iter().filter(|name| name.open().is_ok()).collect()
    }

    /// The device itself.
    ///
    /// # Errors
    /// This build doesn't have it.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Flex => Ok(Device::flex()),
            #[cfg(feature = "libtorch")]
            #[allow(deprecated)] // this release is pinned for it
            Self::LibtorchCpu => Ok(Device::libtorch()),
            #[cfg(feature = "libtorch")]
            #[allow(deprecated)]
            Self::LibtorchCuda(i) => match usize::try_from(tch::Cuda::device_count()) {
                Ok(count) if i < count => Ok(Device::libtorch_cuda(i)),
                count => Err(Error::Conf(format!(
                    "there is no `{self}`: LibTorch sees {} GPUs; it has to be the one for CUDA, \
                     `model/libtorch.sh DIR --cuda`, and the machine needs NVIDIA's driver",
                    count.unwrap_or(0),
                ))),
            },
            #[cfg(not(feature = "libtorch"))]
            Self::LibtorchCpu | Self::LibtorchCuda(_) => Err(Error::Conf(format!(
                "`{self}` needs LibTorch, and this build is without; build with --features libtorch"
            ))),
        }
    }

    /// The most bytes that this process has had on this device, where anyone counts them: the system for the host's
    /// memory, LibTorch's allocator for a GPU's.
    pub fn peak(self) -> Option<u64> {
        match self {
            #[cfg(feature = "libtorch")]
            Self::LibtorchCuda(i) => {
                unsafe extern "C" {
                    fn lw_cuda_peak(device: std::ffi::c_int) -> i64;
                }
                // Safety: reads a count of the allocator's
                u64::try_from(unsafe { lw_cuda_peak(i.try_into().ok()?) }).ok()
            }
            _ => memory("VmHWM:"),
        }
    }

    /// The host's memory beside this device, if it has its own.
    pub fn host(self) -> Option<Self> {
        matches!(self, Self::LibtorchCuda(_)).then_some(Self::LibtorchCpu)
    }

    /// What computes attention with heads of this width here.
    #[cfg_attr(not(feature = "libtorch"), allow(unused_variables))]
    pub fn kernel(self, precision: FloatDType, head_dim: usize) -> Kernel {
        match (self, precision) {
            #[cfg(feature = "libtorch")]
            (Self::LibtorchCpu, FloatDType::F32 | FloatDType::BF16) => Kernel::Flash,
            // CUDA's takes no other type, and no other width
            #[cfg(feature = "libtorch")]
            (Self::LibtorchCuda(_), FloatDType::BF16) if head_dim.is_multiple_of(8) && head_dim <= 256 => {
                Kernel::Flash
            }
            _ => Kernel::Plain,
        }
    }
}

/// Has LibTorch take kernels whose sums have an order. What this process has computed before is not computed again.
pub fn be_deterministic() {
    #[cfg(feature = "libtorch")]
    {
        unsafe extern "C" {
            fn lw_deterministic();
        }
        // Safety: sets a switch of LibTorch's, before any rank computes
        unsafe { lw_deterministic() };
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flex => write!(f, "flex"),
            Self::LibtorchCpu => write!(f, "libtorch-cpu"),
            Self::LibtorchCuda(i) => write!(f, "libtorch-cuda:{i}"),
        }
    }
}

/// Bytes of this process that are in memory, where the system says so.
pub fn resident() -> Option<u64> {
    memory("VmRSS:")
}

fn memory(what: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(what))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
