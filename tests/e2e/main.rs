//! End to end: the program as users run it, on inputs made here.

mod azure;
mod bench;
mod broken;
mod caching;
mod cluster;
mod ecosystem;
mod evaluation;
mod faults;
mod hostile;
mod network;
mod packed;
mod rejects;
mod s3;
mod same_bytes;
mod servers;
mod training;
mod trust;
mod watching;
