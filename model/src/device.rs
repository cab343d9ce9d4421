//! Devices by name: the one place that knows which backends this build has.

use burn::tensor::{Device, FloatDType};

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
    /// There is no such device, or this build doesn't have it.
    pub fn parse(name: &str) -> Result<Self> {
        let parsed = match name {
            "flex" => Some(Self::Flex),
            "libtorch-cpu" => Some(Self::LibtorchCpu),
            _ => name.strip_prefix("libtorch-cuda:").and_then(|i| i.parse().ok()).map(Self::LibtorchCuda),
        };
        match parsed {
            Some(Self::Flex) => Ok(Self::Flex),
            Some(libtorch) if cfg!(feature = "libtorch") => Ok(libtorch),
            Some(_) => Err(Error::Conf(format!(
                "train.devices: `{name}` needs LibTorch, and this build is without; build with --features libtorch"
            ))),
            None => Err(Error::Conf(format!(
                "train.devices: there is no device `{name}`; there are \"flex\", \"libtorch-cpu\" and \"libtorch-cuda:0\", …"
            ))),
        }
    }

    /// Devices of this build that compute on any machine.
    #[cfg(test)]
    pub fn anywhere() -> Vec<Self> {
        ["flex", "libtorch-cpu"].iter().filter_map(|name| Self::parse(name).ok()).collect()
    }

    /// The device itself.
    pub fn open(self) -> Device {
        match self {
            Self::Flex => Device::flex(),
            #[cfg(feature = "libtorch")]
            #[allow(deprecated)] // this release is pinned for it
            Self::LibtorchCpu => Device::libtorch(),
            #[cfg(feature = "libtorch")]
            #[allow(deprecated)]
            Self::LibtorchCuda(i) => Device::libtorch_cuda(i),
            #[cfg(not(feature = "libtorch"))]
            Self::LibtorchCpu | Self::LibtorchCuda(_) => unreachable!("parse refuses what this build lacks"),
        }
    }

    /// The host's memory beside this device, if it has its own.
    pub fn host(self) -> Option<Device> {
        matches!(self, Self::LibtorchCuda(_)).then(|| Self::LibtorchCpu.open())
    }

    /// What computes attention here.
    pub fn kernel(self, precision: FloatDType) -> Kernel {
        match (self, precision) {
            #[cfg(feature = "libtorch")]
            (Self::LibtorchCpu, FloatDType::F32 | FloatDType::BF16) => Kernel::Flash,
            // CUDA's takes no other type
            #[cfg(feature = "libtorch")]
            (Self::LibtorchCuda(_), FloatDType::BF16) => Kernel::Flash,
            _ => Kernel::Plain,
        }
    }
}

/// Bytes of this process that are in memory, where the system says so.
pub fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}
