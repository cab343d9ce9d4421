// A shim for the parts of LibTorch's process groups that the trainer needs. Tensors are passed as at::Tensor*, which tch's
// Tensor::as_ptr returns. Every function returns 0, or 1 with a message in lw_error. The caller owns what out-pointers receive.
#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef LENGTHWISE_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#endif
#ifdef LENGTHWISE_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

using at::Tensor;
using std::chrono::milliseconds;

static thread_local std::string error;

template <class F>
static int catch_errors(F work) {
  try {
    work();
    return 0;
  } catch (const std::exception& e) {
    error = e.what();
  } catch (...) {
    error = "unknown failure";
  }
  return 1;
}

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> store;
};
struct Group {
  c10::intrusive_ptr<c10d::Backend> backend;
  bool nccl;
};
// Gloo prints to stdout, which is for results, when it has connected.
struct CoutToStderr {
  std::streambuf* before = std::cout.rdbuf(std::cerr.rdbuf());
  ~CoutToStderr() { std::cout.rdbuf(before); }
};
// Work in progress, which is kept until it is waited for, with the tensors that it reads and writes.
struct Pending {
  std::vector<c10::intrusive_ptr<c10d::Work>> works;
  std::vector<Tensor> tensors;
};

extern "C" {
const char* lw_error() { return error.c_str(); }

int lw_store_open(const char* host, uint16_t port, int server, int64_t timeout_ms, Store** out) {
  return catch_errors([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new Store{c10::make_intrusive<c10d::TCPStore>(host, options)};
  });
}

int lw_store_set(Store* store, const char* key, const char* value) {
  return catch_errors([&] { store->store->set(key, std::vector<uint8_t>(value, value + std::strlen(value))); });
}

// Sets *length to -1 if there is no such key. A value longer than `room` is cut.
int lw_store_get(Store* store, const char* key, char* value, int64_t room, int64_t* length) {
  return catch_errors([&] {
    *length = -1;
    if (!store->store->check({key})) return;
    auto bytes = store->store->get(key);
    *length = std::min<int64_t>(bytes.size(), room);
    std::copy(bytes.begin(), bytes.begin() + *length, value);
  });
}

void lw_store_close(Store* store) { delete store; }

int lw_group_open(Store* store, const char* backend, const char* name, int rank, int size, int64_t timeout_ms, Group** out) {
  return catch_errors([&] {
    auto prefixed = c10::make_intrusive<c10d::PrefixStore>(name, store->store);
    auto timeout = milliseconds(timeout_ms);
    CoutToStderr redirected;
#ifdef LENGTHWISE_GLOO
    if (std::string(backend) == "gloo") {
      auto options = c10d::ProcessGroupGloo::Options::create(timeout);
      auto interface = std::getenv("GLOO_SOCKET_IFNAME");
      options->devices.push_back(
          interface ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                    : c10d::ProcessGroupGloo::createDefaultDevice());
      *out = new Group{c10::make_intrusive<c10d::ProcessGroupGloo>(prefixed, rank, size, options), false};
      return;
    }
#endif
#ifdef LENGTHWISE_NCCL
    if (std::string(backend) == "nccl") {
      auto options = c10d::ProcessGroupNCCL::Options::create();
      options->timeout = timeout;
      *out = new Group{c10::make_intrusive<c10d::ProcessGroupNCCL>(prefixed, rank, size, options), true};
      return;
    }
#endif
    throw std::runtime_error("this build is without " + std::string(backend));
  });
}

// Drops the connections, so that ranks that wait for this one fail.
void lw_group_close(Group* group) { delete group; }

static std::vector<Tensor> one(const Tensor& tensor) { return {tensor}; }

int lw_all_gather(Group* group, Tensor* in, Tensor* out) {
  return catch_errors([&] { group->backend->_allgather_base(*out, *in, {})->wait(); });
}

int lw_reduce_scatter(Group* group, Tensor* in, Tensor* out) {
  return catch_errors([&] { group->backend->_reduce_scatter_base(*out, *in, {})->wait(); });
}

int lw_all_reduce(Group* group, Tensor* tensor) {
  return catch_errors([&] {
    auto tensors = one(*tensor);
    group->backend->allreduce(tensors, {})->wait();
  });
}

int lw_barrier(Group* group) {
  return catch_errors([&] { group->backend->barrier({})->wait(); });
}

// Starts to send `n` tensors to one rank and to receive as many from another.
int lw_exchange(Group* group, int to, int from, int tag_to, int tag_from, int n, Tensor** in, Tensor** out, Pending** pending) {
  return catch_errors([&] {
    auto all = std::make_unique<Pending>();
    if (group->nccl) group->backend->startCoalescing();
    for (int i = 0; i < n; i++) {
      auto sent = one(*in[i]), received = one(*out[i]);
      auto sending = group->backend->send(sent, to, tag_to + i);
      auto receiving = group->backend->recv(received, from, tag_from + i);
      if (!group->nccl) {
        all->works.push_back(sending);
        all->works.push_back(receiving);
      }
      all->tensors.push_back(*in[i]);
      all->tensors.push_back(*out[i]);
    }
    if (group->nccl) all->works.push_back(group->backend->endCoalescing());
    *pending = all.release();
  });
}

int lw_wait(Pending* pending) {
  auto code = catch_errors([&] {
    for (auto& work : pending->works) work->wait();
  });
  delete pending;
  return code;
}
}
