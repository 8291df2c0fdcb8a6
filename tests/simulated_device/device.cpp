// Two devices that are not the host's, made up: their memory is the host's, their operators are the CPU's, and yet a
// tensor of the host, or of the other one, is none of their own. What a GPU refuses, they refuse: operators on tensors
// of several devices. While `strict`, also whatever keeps a host waiting: reading a value, and copying from a device.
//
// A PyTorch backend under the key PrivateUse1, as docs.pytorch.org describes them for devices of one's own.

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

constexpr auto CHIP = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex COUNT = 2;

bool strict = false;
int inside = 0; // an operator, which takes what is on a chip to the CPU and back
c10::DeviceIndex current = 0;

// --- there is one stream on each

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = CHIP;
  c10::DeviceType type() const override { return CHIP; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {CHIP, current}; }
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
      std::memset(data, 0xAB, bytes); // and no zeros by chance
    }
    return {data, data, &std::free, c10::Device(CHIP, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(CHIP, &memory);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// --- what a backend must bring: memory, copies, views

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard there(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The same numbers at the same place, as a tensor of the host.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().type() != CHIP) {
    return tensor;
  }
  void* data = static_cast<char*>(tensor.storage().mutable_data()) + tensor.storage_offset() * tensor.element_size();
  return at::from_blob(data, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const bool back = from.device().type() == CHIP && to.device().type() != CHIP;
  TORCH_CHECK(!(strict && back && inside == 0), "the host waits for a copy from ", from.device());
  if (from.numel() > 0) {
    on_host(to).copy_(on_host(from));
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) { // a view keeps its strides
    to.resize_(from.sizes());
  }
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& tensor, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  const size_t wanted = (c10::multiply_integers(size) + impl->storage_offset()) * tensor.element_size();
  if (tensor.storage().nbytes() < wanted) {
    const c10::DeviceGuard there(tensor.device());
    auto larger = memory.allocate(wanted);
    std::memcpy(larger.get(), tensor.storage().data(), tensor.storage().nbytes());
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(wanted);
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

// --- everything else: the CPU does it, once it is sure that all tensors are of one device

const std::set<std::string> READS = {
    "aten::_local_scalar_dense", "aten::nonzero",     "aten::equal",       "aten::is_nonzero",
    "aten::masked_select",       "aten::_unique2",    "aten::unique_dim",
};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  TORCH_CHECK(!(strict && READS.count(name)), "the host waits for ", name);
  std::optional<c10::Device> of;
  const auto look = [&](const Tensor& tensor) {
    if (!tensor.defined() || (tensor.device().type() != CHIP && tensor.dim() == 0)) {
      return; // single numbers may come from the host
    }
    TORCH_CHECK(of.value_or(tensor.device()) == tensor.device(), name, ": tensors on ", *of, " and on ", tensor.device());
    of = tensor.device();
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      look(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorVector()) look(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        if (tensor.has_value()) look(*tensor);
      }
    }
  }
  struct Inside {
    Inside() { ++inside; }
    ~Inside() { --inside; }
  } now;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

void be_strict(bool wanted) { strict = wanted; }

TORCH_LIBRARY(made_up_chip, library) { library.def("strict(bool wanted) -> ()", &be_strict); }

} // namespace
