// A device that stands in for a GPU: memory and random numbers of its own, and the CPU's kernels on copies.
// Operators on tensors of two devices are errors, as on a GPU; PyTorch's CPU kernels alone would not mind.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <set>
#include <string>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::IntArrayRef;
using c10::Stream;

Device own() { return Device(DeviceType::PrivateUse1, 0); }

// --- memory, streams and random numbers ---

void release(void* memory) { free(memory); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? malloc(bytes) : nullptr;
    return {memory, memory, &release, own()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

// One stream that is always done; autograd gives the device a thread of its own, as it does a GPU.
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1> {
  Device exchangeDevice(Device) const override { return own(); }
  Device getDevice() const override { return own(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, own()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, own()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, own()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, own()); }
  void record(void** event, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const Stream&) const override {}
  bool queryStream(const Stream&) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator : at::CPUGeneratorImpl {
  explicit Generator(uint64_t seed) : at::CPUGeneratorImpl(seed) {
    show(own());
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  void show(Device device) { device_ = device; }
};

struct Hooks : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(5489); }
  Device getDeviceFromPtr(void*) const override { return own(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr grown = memory.allocate(bytes);
    if (storage.nbytes()) memcpy(grown.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// --- operators ---

thread_local int within = 0;  // a kernel of the CPU's, which may copy as it likes

struct Within {
  Within() { within++; }
  ~Within() { within--; }
};

Tensor on_host(const Tensor& t) {
  if (t.device().is_cpu()) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(at::kCPU);
  auto shown = at::from_blob(
      t.storage().mutable_data(), t.sizes(), t.strides(), t.storage_offset(), [](void*) {}, options);
  shown._set_conj(t.is_conj());
  shown._set_neg(t.is_neg());
  return shown;
}

Tensor empty(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>) {
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Within here;
  at::AutoDispatchBelowAutograd plain;
  if (from.numel()) on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  Within here;
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar value_of(const Tensor& t) {
  Within here;
  return on_host(t).item();
}

Tensor& set_storage(Tensor& t, c10::Storage storage) {
  const int64_t entries = storage.nbytes() / t.dtype().itemsize();
  return at::native::set_storage_cpu_(t, storage, 0, {entries}, {1});
}

Tensor& set_window(Tensor& t, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, storage, offset, size, stride);
}

// Indices may lie on the CPU, and numbers; nothing else.
void require_one_device(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> args) {
  static const std::set<std::string> indexed = {
      "aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::_index_put_impl_"};
  const auto& name = op.schema().name();
  if (indexed.count(name)) return;
  bool here = false, elsewhere = false;
  auto look = [&](const Tensor& t) {
    if (t.defined()) (t.device().is_cpu() ? elsewhere : here) |= !t.device().is_cpu() || t.dim() > 0;
  };
  for (const auto& v : args) {
    if (v.isTensor()) look(v.toTensor());
    if (v.isTensorList())
      for (const Tensor& t : v.toTensorVector()) look(t);
    if (v.isGenerator()) TORCH_CHECK(!v.toGenerator().device().is_cpu(), name, " has a generator of the CPU");
  }
  TORCH_CHECK(!(here && elsewhere), "expected all tensors on one device in ", name);
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto args = torch::jit::last(*stack, op.schema().arguments().size());
  if (!within) require_one_device(op, args);
  Within here;
  std::vector<at::Generator> generators;
  for (const auto& v : args)
    if (v.isGenerator() && !v.toGenerator().device().is_cpu()) generators.push_back(v.toGenerator());
  auto show = [&](Device device) {
    for (auto& g : generators) static_cast<Generator*>(g.unsafeGetGeneratorImpl())->show(device);
  };
  show(Device(DeviceType::CPU));
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    show(own());
    throw;
  }
  show(own());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &value_of);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_window);
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("resize_", TORCH_FN(at::native::resize_));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
