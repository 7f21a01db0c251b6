// Ops whose kernels are launched from C++, as a first run in Python launched them.
//
// attach() puts a boxed kernel before an op's Python implementation. It writes down all that a launch may depend on: of
// a tensor dtype, device, sizes, strides, the address modulo 16 and which earlier argument it is; of everything else
// its value. The first call of such a signature runs Python, which compiles; the second is recorded in Python
// (recorder.py), which hands a plan to commit(); each one after it allocates and launches what the plan says. What is
// no pure function of its signature is refused by the recorder, and stays in Python.
//
// An op may have an owner among its arguments, a tensor for which Python may keep the results (weights.py). While Python
// permits it, a call is one without an owner: every call, or the first after each time that the owner is written to or an
// optimizer has stepped.

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_strided_ops.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "replay.h"

namespace quartet {
namespace {

using c10::IValue;
using torch::jit::Stack;
using Words = std::vector<int64_t>;

// ---- the driver -----------------------------------------------------------------------------------------------------

struct Driver {
  using Launch = int (*)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                         void**);
  using Fill = int (*)(uint64_t, unsigned char, size_t, void*);
  using Describe = int (*)(int, const char**);
  using PrimaryContext = int (*)(void**, int);
  using SetContext = int (*)(void*);
  using Stream = int32_t (*)(int32_t, void**);

  Launch launch = nullptr;
  Fill fill = nullptr;
  Describe describe = nullptr;
  PrimaryContext primary_context = nullptr;
  SetContext set_context = nullptr;
  Stream stream = nullptr;  // of PyTorch; without CUDA there is none, and launches go to stream 0
};

Driver driver;
std::atomic<bool> enabled{true};
std::atomic<int64_t> most_signatures{1 << 14};  // of an op; one more, and it forgets all of them

constexpr int kInvalidContext = 201;

void* symbol(void* library, const char* name, const std::string& path) {
  void* found = dlsym(library, name);
  TORCH_CHECK(found != nullptr, path, " has no ", name);
  return found;
}

void open_driver(const std::string& path) {
  void* cuda = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  TORCH_CHECK(cuda != nullptr, "the CUDA driver does not load: ", dlerror());
  driver.launch = reinterpret_cast<Driver::Launch>(symbol(cuda, "cuLaunchKernel", path));
  driver.fill = reinterpret_cast<Driver::Fill>(symbol(cuda, "cuMemsetD8Async", path));
  driver.describe = reinterpret_cast<Driver::Describe>(symbol(cuda, "cuGetErrorName", path));
  driver.primary_context = reinterpret_cast<Driver::PrimaryContext>(symbol(cuda, "cuDevicePrimaryCtxRetain", path));
  driver.set_context = reinterpret_cast<Driver::SetContext>(symbol(cuda, "cuCtxSetCurrent", path));
  if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
    driver.stream =
        reinterpret_cast<Driver::Stream>(symbol(torch_cuda, "aoti_torch_get_current_cuda_stream", "libtorch_cuda.so"));
  }
}

void check(int status, const std::string& op, const std::string& what) {
  if (C10_LIKELY(status == 0)) return;
  const char* name = nullptr;
  driver.describe(status, &name);
  TORCH_CHECK(false, op, ": the launch of ", what, " failed with ", name ? name : "an unknown error", " (", status,
              ")");
}

// A thread that has made no CUDA call yet has no context: that of PyTorch is the device's primary one.
template <typename Call>
void in_context(int device, const std::string& op, const std::string& what, Call call) {
  int status = call();
  if (C10_UNLIKELY(status == kInvalidContext)) {
    void* context = nullptr;
    if (driver.primary_context(&context, device) == 0 && driver.set_context(context) == 0) status = call();
  }
  check(status, op, what);
}

// ---- plans ----------------------------------------------------------------------------------------------------------

enum Source : int64_t { kInput, kBuffer, kHeld, kScalar };

struct Value {  // of a kernel's parameter, or the place of a fill
  Source source;
  int64_t index;  // of the tensor; the bits of a scalar
  int64_t offset;  // in bytes, from the first element of that tensor
};

struct Buffer {
  c10::ScalarType dtype;
  Words sizes, strides;
  int64_t elements;
};

struct Step {
  void* function;  // none: `bytes` zeros are written to the one value
  unsigned grid[3], threads, shared;
  size_t bytes;
  std::vector<Value> values;
  std::string name;
};

struct Result {
  int64_t buffer;
  bool whole;  // the buffer itself; else a view of it
  c10::ScalarType dtype;
  int64_t offset;  // in elements of dtype, from the start of the storage
  Words sizes, strides;
};

struct Plan {
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  std::vector<Result> results;
  std::vector<at::Tensor> held;
};

// Reads what recorder.py writes: see Recorder.plan there.
struct Reader {
  c10::ArrayRef<int64_t> words;
  size_t at = 0;

  int64_t next() {
    TORCH_CHECK(at < words.size(), "a plan ends early");
    return words[at++];
  }
  Words list() {
    Words found(next());
    for (auto& word : found) word = next();
    return found;
  }
  c10::ScalarType dtype() { return static_cast<c10::ScalarType>(next()); }
  Value value() {
    const auto source = static_cast<Source>(next());
    const auto index = next();
    return {source, index, next()};
  }
};

std::shared_ptr<const Plan> read_plan(c10::ArrayRef<int64_t> words, const std::vector<std::string>& names,
                                      std::vector<at::Tensor> held) {
  auto plan = std::make_shared<Plan>();
  plan->held = std::move(held);
  Reader reader{words};
  plan->buffers.resize(reader.next());
  for (auto& buffer : plan->buffers) {
    buffer.dtype = reader.dtype();
    buffer.sizes = reader.list();
    buffer.strides = reader.list();
    buffer.elements = c10::multiply_integers(buffer.sizes);
  }
  plan->steps.resize(reader.next());
  TORCH_CHECK(plan->steps.size() == names.size(), "a plan names ", names.size(), " of ", plan->steps.size(), " steps");
  for (size_t i = 0; i < plan->steps.size(); ++i) {
    auto& step = plan->steps[i];
    step.name = names[i];
    step.function = reinterpret_cast<void*>(reader.next());
    for (auto& extent : step.grid) extent = static_cast<unsigned>(reader.next());
    step.threads = static_cast<unsigned>(reader.next());
    step.shared = static_cast<unsigned>(reader.next());
    step.bytes = static_cast<size_t>(reader.next());
    step.values.resize(reader.next());
    for (auto& value : step.values) value = reader.value();
  }
  plan->results.resize(reader.next());
  for (auto& result : plan->results) {
    result.buffer = reader.next();
    result.whole = reader.next() != 0;
    result.dtype = reader.dtype();
    result.offset = reader.next();
    result.sizes = reader.list();
    result.strides = reader.list();
  }
  TORCH_CHECK(reader.at == words.size(), "a plan has ", words.size() - reader.at, " words too many");
  return plan;
}

// ---- signatures -----------------------------------------------------------------------------------------------------

struct Signature {
  Words words;
  size_t hash = 0;

  void finish() {
    uint64_t mixed = words.size();
    for (const auto word : words) {
      mixed = (mixed ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15ULL;
      mixed ^= mixed >> 32;
    }
    hash = mixed;
  }
  bool operator==(const Signature& other) const { return words == other.words; }
};

struct HashOf {
  size_t operator()(const Signature& signature) const { return signature.hash; }
};

enum Tag : int64_t { kNone, kTensor, kInt, kDouble, kBool, kString, kDevice, kInts, kTensors };

using Inputs = c10::SmallVector<const at::Tensor*, 8>;

void write_tensor(const at::Tensor& tensor, Words& words, Inputs& inputs) {
  if (!tensor.defined()) {
    words.push_back(kNone);
    return;
  }
  int64_t same = inputs.size();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i]->is_same(tensor)) {
      same = i;
      break;
    }
  }
  inputs.push_back(&tensor);
  const auto device = tensor.device();
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  words.push_back(kTensor | tensor.dim() << 4 | static_cast<int64_t>(tensor.scalar_type()) << 16 |
                  static_cast<int64_t>(device.type()) << 24 | static_cast<int64_t>(device.index() & 0xFF) << 32 |
                  static_cast<int64_t>(address & 15) << 40 | same << 48);
  for (const auto size : tensor.sizes()) words.push_back(size);
  for (const auto stride : tensor.strides()) words.push_back(stride);
}

// Whether the argument is of a kind that is understood.
bool write(const IValue& argument, Words& words, Inputs& inputs) {
  if (argument.isTensor()) {
    const auto& tensor = argument.toTensor();
    if (tensor.defined() && tensor.layout() != c10::kStrided) return false;
    write_tensor(tensor, words, inputs);
  } else if (argument.isTensorList()) {
    const auto list = argument.toListRef();
    words.push_back(kTensors | static_cast<int64_t>(list.size()) << 8);
    for (const IValue& each : list) {
      if (!write(each, words, inputs)) return false;
    }
  } else if (argument.isNone()) {
    words.push_back(kNone);
  } else if (argument.isInt()) {
    words.push_back(kInt);
    words.push_back(argument.toInt());
  } else if (argument.isBool()) {
    words.push_back(kBool | static_cast<int64_t>(argument.toBool()) << 8);
  } else if (argument.isDouble()) {
    const double value = argument.toDouble();
    int64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    words.push_back(kDouble);
    words.push_back(bits);
  } else if (argument.isString()) {
    const auto& text = argument.toStringRef();
    const size_t start = words.size() + 1;
    words.push_back(kString | static_cast<int64_t>(text.size()) << 8);
    words.resize(start + (text.size() + 7) / 8, 0);
    std::memcpy(words.data() + start, text.data(), text.size());
  } else if (argument.isDevice()) {
    const auto device = argument.toDevice();
    words.push_back(kDevice | static_cast<int64_t>(device.type()) << 8 |
                    static_cast<int64_t>(device.index() & 0xFF) << 16);
  } else if (argument.isIntList()) {
    const auto list = argument.toIntList();
    words.push_back(kInts | static_cast<int64_t>(list.size()) << 8);
    for (const int64_t value : list) words.push_back(value);
  } else {
    return false;
  }
  return true;
}

// ---- ops ------------------------------------------------------------------------------------------------------------

struct Known {
  enum { kSeen, kRefused, kPlanned } state = kSeen;
  std::shared_ptr<const Plan> plan;
};

}  // namespace

constexpr int64_t kEvery = -1;  // no version
std::atomic<int64_t> steps{0};  // of optimizers: those that update by one fused kernel leave the version counter as it is

int64_t version_of(const at::Tensor& owner) { return (steps.load() << 32) + owner._version(); }

struct Attached {
  Attached(std::string name, c10::OperatorHandle python, c10::DispatchKey key, int64_t owner)
      : name(std::move(name)), python(python), key(key), owner(owner) {}

  const std::string name;
  const c10::OperatorHandle python;
  c10::DispatchKey key;  // whose calls it takes
  int64_t owner;  // its position; −1: none
  std::shared_mutex guard;
  std::unordered_map<Signature, Known, HashOf> known;
  std::unordered_map<Signature, int64_t, HashOf> permitted;  // to the owner's version at the last call, or kEvery
  std::atomic<int64_t> replays{0}, runs{0}, forgotten{0};
};

namespace {

// Neither is ever destroyed: at the end of a process the dispatcher and the memory of plans may go first.
std::mutex registry_guard;
auto& registry = *new std::unordered_map<std::string, std::unique_ptr<Attached>>;  // an op once attached stays here
auto& registrations = *new std::unordered_map<std::string, std::unique_ptr<torch::Library>>;

struct Recording {
  Attached* op;
  const Signature* signature;
  bool claimed = false;
};

struct Owned {  // a call with an owner that Python runs
  Attached* op;
  const Signature* signature;
  int64_t version;
  bool repeated;  // the owner is as it was at the last call
};

template <typename Item>
struct Pushed {
  Pushed(std::vector<Item>& stack, Item item) : stack(stack) { stack.push_back(item); }
  ~Pushed() { stack.pop_back(); }
  std::vector<Item>& stack;
};

thread_local std::vector<Recording> recordings;
thread_local std::vector<Owned> owned;

template <typename Entry>
void remember(Attached& op, std::unordered_map<Signature, Entry, HashOf>& entries, const Signature& signature,
              Entry entry) {
  const std::unique_lock lock(op.guard);
  if (static_cast<int64_t>(entries.size()) >= most_signatures && !entries.count(signature)) {
    entries.clear();
    ++op.forgotten;
  }
  entries[signature] = std::move(entry);
}

void* current_stream(c10::Device device) {
  void* stream = nullptr;
  if (driver.stream != nullptr && device.is_cuda()) {
    TORCH_CHECK(driver.stream(device.index(), &stream) == 0, "PyTorch does not tell the current stream of ", device);
  }
  return stream;
}

at::Tensor allocate(const Buffer& buffer, c10::Device device, c10::DispatchKeySet key) {
  if (buffer.elements == 0) {  // a result that was not asked for: no allocator has a say in it
    return at::detail::empty_strided_generic(buffer.sizes, buffer.strides, c10::GetAllocator(device.type()), key,
                                             buffer.dtype);
  }
  return at::_ops::empty_strided::redispatch(key, c10::fromIntArrayRefUnchecked(buffer.sizes),
                                             c10::fromIntArrayRefUnchecked(buffer.strides), buffer.dtype, c10::kStrided,
                                             device, std::nullopt);
}

at::Tensor view(const at::Tensor& base, const Result& result) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(base.storage()), base.key_set(),
                                                       c10::scalarTypeToTypeMeta(result.dtype));
  made.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes, result.strides, result.offset);
  return made;
}

void replay(const Attached& op, const Plan& plan, const Inputs& inputs, std::vector<at::Tensor>& results) {
  const auto device = inputs.front()->device();
  const c10::OptionalDeviceGuard guard(device.is_cpu() ? std::nullopt : std::optional(device));
  const c10::DispatchKeySet key(op.key);
  c10::SmallVector<at::Tensor, 8> buffers;
  for (const auto& buffer : plan.buffers) buffers.push_back(allocate(buffer, device, key));
  void* const stream = current_stream(device);
  c10::SmallVector<uint64_t, 32> values;
  c10::SmallVector<void*, 32> pointers;
  for (const auto& step : plan.steps) {
    values.clear();
    pointers.clear();
    for (const auto& value : step.values) {
      const at::Tensor* tensor = value.source == kInput    ? inputs[value.index]
                                 : value.source == kBuffer ? &buffers[value.index]
                                 : value.source == kHeld   ? &plan.held[value.index]
                                                           : nullptr;
      values.push_back(tensor == nullptr ? static_cast<uint64_t>(value.index)
                                         : reinterpret_cast<uint64_t>(tensor->data_ptr()) + value.offset);
    }
    for (auto& value : values) pointers.push_back(&value);
    in_context(device.index(), op.name, step.name, [&] {
      return step.function == nullptr ? driver.fill(values[0], 0, step.bytes, stream)
                                      : driver.launch(step.function, step.grid[0], step.grid[1], step.grid[2],
                                                      step.threads, 1, 1, step.shared, stream, pointers.data(), nullptr);
    });
  }
  for (const auto& result : plan.results) {
    auto& buffer = buffers[result.buffer];
    if (result.whole) {
      results.push_back(std::move(buffer));
    } else {
      results.push_back(view(buffer, result));
    }
  }
}

// ---- calls ----------------------------------------------------------------------------------------------------------

// Whether all arguments are of kinds that are understood.
bool describe(const IValue* arguments, size_t count, Signature& signature, Inputs& inputs) {
  for (size_t i = 0; i < count; ++i) {
    if (!write(arguments[i], signature.words, inputs)) return false;
  }
  return true;
}

// The signature of a call whose owner is there, with the place of the owner.
bool describe_owned(const Attached& op, const IValue* arguments, size_t count, Signature& signature) {
  Inputs inputs;
  const auto& owner = arguments[op.owner].toTensor();
  if (owner.is_inference() || !describe(arguments, count, signature, inputs)) return false;
  signature.words.push_back(reinterpret_cast<int64_t>(owner.data_ptr()));
  signature.finish();
  return true;
}

bool has_owner(const Attached& op, const IValue* arguments) {
  return op.owner >= 0 && !arguments[op.owner].isNone();
}

template <typename Entry>
std::optional<Entry> find(Attached& op, const std::unordered_map<Signature, Entry, HashOf>& entries,
                          const Signature& signature) {
  const std::shared_lock lock(op.guard);
  const auto found = entries.find(signature);
  return found == entries.end() ? std::nullopt : std::optional(found->second);
}

class Replay final : public c10::OperatorKernel {
 public:
  explicit Replay(Attached& op) : op_(op) {}

  void operator()(const c10::OperatorHandle& handle, c10::DispatchKeySet keys, Stack* stack) {
    const size_t count = handle.schema().arguments().size();
    IValue* const arguments = stack->data() + stack->size() - count;
    std::vector<at::Tensor> results;
    if (serve(op_, arguments, count, results)) {
      torch::jit::drop(*stack, count);
      if (returns_list(handle.schema())) {
        stack->emplace_back(c10::List<at::Tensor>(std::move(results)));
      } else {
        for (auto& result : results) stack->emplace_back(std::move(result));
      }
      return;
    }
    Signature signature;
    Inputs inputs;
    if (!enabled) {
      run(keys, stack);
    } else if (has_owner(op_, arguments)) {
      run_owned(keys, stack, arguments, count);
    } else if (!describe(arguments, count, signature, inputs) || inputs.empty()) {
      run(keys, stack);
    } else {
      signature.finish();
      run_described(keys, stack, signature);
    }
  }

 private:
  void run(c10::DispatchKeySet keys, Stack* stack) {
    ++op_.runs;
    op_.python.redispatchBoxed(keys, stack);
  }

  void run_owned(c10::DispatchKeySet keys, Stack* stack, IValue* arguments, size_t count) {
    Signature signature;
    if (!describe_owned(op_, arguments, count, signature)) {
      run(keys, stack);
      return;
    }
    const int64_t version = version_of(arguments[op_.owner].toTensor());
    const auto before = find(op_, op_.permitted, signature);
    if (before && *before != version) {  // permitted, but without a plan yet
      if (*before != kEvery) remember(op_, op_.permitted, signature, version);
      arguments[op_.owner] = IValue();
      (*this)(op_.python, keys, stack);
      return;
    }
    const Pushed<Owned> call(owned, {&op_, &signature, version, before.has_value()});
    run(keys, stack);
  }

  void run_described(c10::DispatchKeySet keys, Stack* stack, const Signature& signature) {
    const auto known = find(op_, op_.known, signature);
    if (known && known->state == Known::kSeen) {
      const Pushed<Recording> call(recordings, {&op_, &signature});
      run(keys, stack);
      return;
    }
    if (!known) remember(op_, op_.known, signature, {});
    run(keys, stack);
  }

  Attached& op_;
};

}  // namespace

Attached* attached(const std::string& called) {
  const std::lock_guard lock(registry_guard);
  const auto found = registry.find(called);
  return found == registry.end() ? nullptr : found->second.get();
}

bool returns_list(const c10::FunctionSchema& schema) {
  return schema.returns().size() == 1 && schema.returns()[0].type()->kind() == c10::TypeKind::ListType;
}

const c10::FunctionSchema& schema_of(const Attached& op) { return op.python.schema(); }

c10::DispatchKey key_of(const Attached& op) { return op.key; }

bool serve(Attached& op, IValue* arguments, size_t count, std::vector<at::Tensor>& results) {
  thread_local Signature signature;  // its memory is kept
  if (!enabled) return false;
  IValue owner;
  Signature owned_signature;
  int64_t version = kEvery;
  if (has_owner(op, arguments)) {
    if (!describe_owned(op, arguments, count, owned_signature)) return false;
    version = version_of(arguments[op.owner].toTensor());
    const auto before = find(op, op.permitted, owned_signature);
    if (!before || *before == version) return false;
    if (*before == kEvery) version = kEvery;
    std::swap(owner, arguments[op.owner]);
  }
  signature.words.clear();
  Inputs inputs;
  std::optional<Known> known;
  if (describe(arguments, count, signature, inputs) && !inputs.empty()) {
    signature.finish();
    known = find(op, op.known, signature);
  }
  if (!known || known->plan == nullptr) {
    if (!owner.isNone()) std::swap(owner, arguments[op.owner]);
    return false;
  }
  if (version != kEvery) remember(op, op.permitted, owned_signature, version);
  replay(op, *known->plan, inputs, results);
  ++op.replays;
  return true;
}

namespace {

// ---- what Python calls ----------------------------------------------------------------------------------------------

void attach(const std::string& name, const std::string& overload, const std::string& key, int64_t owner) {
  const auto python = c10::Dispatcher::singleton().findSchemaOrThrow(("quartet_python::" + name).c_str(),
                                                                     overload.c_str());
  const auto called = overload.empty() ? name : name + "." + overload;
  const std::lock_guard lock(registry_guard);
  TORCH_CHECK(!registrations.count(called), called, " is attached");
  auto& op = registry[called];
  const auto taken = c10::parseDispatchKey(key);
  if (op == nullptr) op = std::make_unique<Attached>("quartet::" + called, python, taken, owner);
  op->key = taken;  // those of another provider than before, perhaps
  op->owner = owner;
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "quartet", taken, __FILE__, __LINE__);
  library->impl(called.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Replay>(*op)));
  registrations[called] = std::move(library);
}

// Another implementation of the op may follow: what was recorded of this one is void.
void detach(const std::string& called) {
  const std::lock_guard lock(registry_guard);
  const auto found = registry.find(called);
  if (found == registry.end()) return;
  registrations.erase(called);
  const std::unique_lock known(found->second->guard);
  found->second->known.clear();
  found->second->permitted.clear();
}

Recording& current() {
  TORCH_CHECK(!recordings.empty() && recordings.back().claimed, "nothing is being recorded on this thread");
  return recordings.back();
}

void commit(c10::IntArrayRef words, const c10::List<std::string>& names, const std::vector<at::Tensor>& held) {
  auto& recording = current();
  std::vector<std::string> given;
  for (size_t i = 0; i < names.size(); ++i) given.push_back(names.get(i));
  remember(*recording.op, recording.op->known, *recording.signature,
           {Known::kPlanned, read_plan(words, given, held)});
}

void refuse() {
  auto& recording = current();
  remember(*recording.op, recording.op->known, *recording.signature, {Known::kRefused, nullptr});
}

// Whether calls with this one's owner may do without Python; otherwise once each time that it has been written to.
void permit(bool every) {
  if (owned.empty()) return;
  const auto& call = owned.back();
  remember(*call.op, call.op->permitted, *call.signature, every ? kEvery : call.version);
}

void forbid() {
  if (owned.empty()) return;
  const auto& call = owned.back();
  const std::unique_lock lock(call.op->guard);
  call.op->permitted.erase(*call.signature);
}

void forbid_all() {
  const std::lock_guard lock(registry_guard);
  for (auto& entry : registry) {
    const std::unique_lock known(entry.second->guard);
    entry.second->permitted.clear();
  }
}

// replays, runs in Python, plans, signatures without one, how often all were forgotten
std::vector<int64_t> counts(const std::string& called) {
  const std::lock_guard lock(registry_guard);
  const auto found = registry.find(called);
  if (found == registry.end()) return {};
  auto& op = *found->second;
  const std::shared_lock known(op.guard);
  int64_t plans = 0;
  for (const auto& entry : op.known) plans += entry.second.plan != nullptr;
  return {op.replays, op.runs, plans, static_cast<int64_t>(op.known.size()) - plans, op.forgotten};
}

}  // namespace
}  // namespace quartet

// Whether the call that this thread has just been given is to be recorded; true once a call.
extern "C" int quartet_claim_recording() {
  using quartet::recordings;
  if (recordings.empty() || recordings.back().claimed) return 0;
  recordings.back().claimed = true;
  return 1;
}

TORCH_LIBRARY(quartet_replay, library) {
  using namespace quartet;
  library.def("open_driver(str path) -> ()", [](std::string path) { open_driver(path); });
  library.def("attach(str name, str overload, str key, int owner) -> ()",
              [](std::string name, std::string overload, std::string key, int64_t owner) {
                attach(name, overload, key, owner);
              });
  library.def("detach(str name) -> ()", [](std::string name) { detach(name); });
  library.def("commit(int[] words, str[] names, Tensor[] held) -> ()",
              [](c10::IntArrayRef words, c10::List<std::string> names, std::vector<at::Tensor> held) {
                commit(words, names, held);
              });
  library.def("permit(bool every) -> ()", [](bool every) { permit(every); });
  library.def("forbid() -> ()", [] { forbid(); });
  library.def("forbid_all() -> ()", [] { forbid_all(); });
  library.def("stepped() -> ()", [] { ++steps; });
  library.def("repeated() -> bool", [] { return !owned.empty() && owned.back().repeated; });
  library.def("number(ScalarType dtype) -> int", [](c10::ScalarType dtype) { return static_cast<int64_t>(dtype); });
  library.def("refuse() -> ()", [] { refuse(); });
  library.def("counts(str name) -> int[]", [](std::string name) { return counts(name); });
  library.def("limit(int signatures) -> ()", [](int64_t signatures) { most_signatures = signatures; });
  library.def("enable(bool on) -> ()", [](bool on) { enabled = on; });
}
