//! End to end: the program as users run it, on inputs made here.

mod azure;
mod broken;
mod caching;
mod codes;
mod disk;
mod ecosystem;
mod environment;
mod evaluation;
mod faults;
mod hostile;
mod init;
mod network;
mod packed;
mod printing;
mod project;
mod rejects;
mod s3;
mod same_bytes;
#[allow(dead_code)] // only the tests of a cluster restart servers
mod servers;
mod training;
mod trust;
mod watching;
