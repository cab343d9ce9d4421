//! Devices by name. Only this module knows which backends this build has.

use burn_tensor::{Device, FloatDType};

use crate::attention::Kernel;
use crate::{Error, Result};

/// A name in `[train] devices`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum DeviceName {
    /// Pure Rust, on the CPU.
    Flex,
    /// LibTorch on the CPU.
    LibtorchCpu,
    /// LibTorch on a GPU.
    LibtorchCuda(usize),
}

impl DeviceName {
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

    /// The devices that this build can open on this machine; of several GPUs the first.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        let names = [Self::Flex, Self::LibtorchCpu, Self::LibtorchCuda(0)];
        names.into_iter().filter(|name| name.open().is_ok()).collect()
    }

    /// Opens the device.
    ///
    /// # Errors
    /// This build or this machine does not have it.
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

    /// The peak memory of this process on this device in bytes, if it is known: the operating system counts the host's
    /// memory, LibTorch's allocator a GPU's.
    pub fn peak_memory(self) -> Option<u64> {
        match self {
            #[cfg(feature = "libtorch")]
            Self::LibtorchCuda(i) => {
                unsafe extern "C" {
                    fn lw_cuda_peak(device: std::ffi::c_int) -> i64;
                }
                // Safety: this only reads a counter of the allocator
                u64::try_from(unsafe { lw_cuda_peak(i.try_into().ok()?) }).ok()
            }
            _ => proc_status_bytes("VmHWM:"),
        }
    }

    /// The device for the host's memory, if this device has a memory of its own.
    pub fn host_device(self) -> Option<Self> {
        matches!(self, Self::LibtorchCuda(_)).then_some(Self::LibtorchCpu)
    }

    /// The attention kernel for heads of this width.
    #[cfg_attr(not(feature = "libtorch"), allow(unused_variables))]
    pub fn kernel(self, precision: FloatDType, head_dim: usize) -> Kernel {
        match (self, precision) {
            #[cfg(feature = "libtorch")]
            (Self::LibtorchCpu, FloatDType::F32 | FloatDType::BF16) => Kernel::Flash,
            // CUDA's kernel supports no other type and no other width.
            #[cfg(feature = "libtorch")]
            (Self::LibtorchCuda(_), FloatDType::BF16) if head_dim.is_multiple_of(8) && head_dim <= 256 => {
                Kernel::Flash
            }
            _ => Kernel::Plain,
        }
    }
}

/// Makes LibTorch use deterministic kernels from now on.
pub fn use_deterministic_kernels() {
    #[cfg(feature = "libtorch")]
    {
        unsafe extern "C" {
            fn lw_deterministic();
        }
        // Safety: this sets a switch of LibTorch before any rank computes
        unsafe { lw_deterministic() };
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flex => write!(f, "flex"),
            Self::LibtorchCpu => write!(f, "libtorch-cpu"),
            Self::LibtorchCuda(i) => write!(f, "libtorch-cuda:{i}"),
        }
    }
}

/// The resident memory of this process in bytes, if the system reports it.
pub fn resident_memory() -> Option<u64> {
    proc_status_bytes("VmRSS:")
}

fn proc_status_bytes(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
