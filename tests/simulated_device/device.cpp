// Two simulated devices for tests that need a GPU's rules without a GPU.
//
// Their memory is ordinary host memory and the CPU computes their operators, but PyTorch treats their tensors as living
// elsewhere. Like a GPU, they refuse operators on tensors of several devices. In strict mode they also refuse whatever
// makes the host wait for the device: reading a value, and copying from the device to the host.
//
// This is a PyTorch backend under the key PrivateUse1, which docs.pytorch.org documents for out-of-tree devices.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr auto SIMULATED = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex COUNT = 2;

bool strict = false;
int depth = 0; // > 0 while an operator runs: it copies its operands to the CPU and back, which is allowed
c10::DeviceIndex current = 0;

// --- Device guard. Each device has one stream.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = SIMULATED;
  c10::DeviceType type() const override { return SIMULATED; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {SIMULATED, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes > 0) {
      TORCH_CHECK(posix_memalign(&data, 64, bytes) == 0);
      std::memset(data, 0xAB, bytes); // so that code relying on zeroed memory fails
    }
    return {data, data, &std::free, c10::Device(SIMULATED, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(SIMULATED, &memory);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }  // torch 2.6 does not have these two to override
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// --- The operators that every backend must implement: memory, copies and views.

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// Return a host tensor that shares the memory of `tensor`.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().type() != SIMULATED) {
    return tensor;
  }
  void* data = static_cast<char*>(tensor.storage().mutable_data()) + tensor.storage_offset() * tensor.element_size();
  return at::from_blob(data, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const bool to_host = from.device().type() == SIMULATED && to.device().type() != SIMULATED;
  TORCH_CHECK(!(strict && to_host && depth == 0), "the host waits for a copy from ", from.device());
  if (from.numel() > 0) {
    on_host(to).copy_(on_host(from));
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) { // do not resize a view, which would lose its strides
    to.resize_(from.sizes());
  }
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& tensor, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const size_t bytes = (c10::multiply_integers(size) + impl->storage_offset()) * tensor.element_size();
  if (tensor.storage().nbytes() < bytes) {
    const c10::DeviceGuard guard(tensor.device());
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), tensor.storage().data(), tensor.storage().nbytes());
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(size);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  at::native::checkSetStorage(tensor, std::move(storage), offset, size, stride);
  tensor.unsafeGetTensorImpl()->set_storage_offset(offset);
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return tensor;
}

Tensor reshape_alias(const Tensor& tensor, IntArrayRef size, IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, tensor.storage_offset());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("view", &at::native::view);
}

// --- All other operators run on the CPU, after a check that their tensors are on one device.

const std::set<std::string> WAITING_OPERATORS = {
    "aten::_local_scalar_dense", "aten::nonzero",     "aten::equal",       "aten::is_nonzero",
    "aten::masked_select",       "aten::_unique2",    "aten::unique_dim",
};

// Their sums of floating-point numbers depend on the order in which a GPU's threads come to it.
const std::set<std::string> UNORDERED_OPERATORS = {
    "aten::cumsum",     "aten::cumsum_",     "aten::cumprod",     "aten::cumprod_",
    "aten::index_add",  "aten::index_add_",  "aten::scatter_add", "aten::scatter_add_",
};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  TORCH_CHECK(!(strict && WAITING_OPERATORS.count(name)), "the host waits for ", name);
  if (UNORDERED_OPERATORS.count(name)) {
    const auto& first = torch::jit::peek(*stack, 0, op.schema().arguments().size());
    TORCH_CHECK(!at::isFloatingType(first.toTensor().scalar_type()), name, " gives other sums every time on a GPU");
  }
  std::optional<c10::Device> device;
  const auto check = [&](const Tensor& tensor) {
    if (!tensor.defined() || (tensor.device().type() != SIMULATED && tensor.dim() == 0)) {
      return; // scalars may live on the host
    }
    TORCH_CHECK(device.value_or(tensor.device()) == tensor.device(), name, ": tensors on ", *device, " and on ", tensor.device());
    device = tensor.device();
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      check(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) check(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor.has_value()) check(*tensor);
      }
    }
  }
  struct OperatorScope {
    OperatorScope() { ++depth; }
    ~OperatorScope() { --depth; }
  } scope;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

void set_strict(bool enabled) { strict = enabled; }

TORCH_LIBRARY(simulated_device, library) { library.def("set_strict(bool enabled) -> ()", &set_strict); }

} // namespace
