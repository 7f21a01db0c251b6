// An op called from Python without PyTorch's dispatcher between, where that would change nothing but the time it takes.
//
// quartet_direct_call(name, usual) is a callable over `usual`, the function that torch.ops calls. It reads the arguments
// by the op's schema and has serve() launch. Whatever it does not know calls `usual`: arguments of other types, subclasses
// of tensors, modes, transforms, tracing, gradients to be recorded, a profiler, a call that has no plan.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <algorithm>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "replay.h"

namespace {

using c10::IValue;

enum class Kind { kTensor, kInt, kFloat, kBool, kString, kDtype, kInts, kTensors, kOther };

struct Parameter {
  PyObject* name;  // interned, and never freed
  Kind kind;
  bool optional;
  std::optional<IValue> given;  // the default
};

struct Op {
  quartet::Attached* attached;
  c10::DispatchKey key;
  enum { kOne, kTuple, kList } results;
  std::vector<Parameter> parameters;
};

struct DirectCall {
  PyObject_HEAD
  vectorcallfunc call;
  PyObject* usual;
  Op* op;
};

Kind kind_of(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::TensorType: return Kind::kTensor;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType: return Kind::kInt;
    case c10::TypeKind::ScalarTypeType: return Kind::kDtype;
    case c10::TypeKind::FloatType: return Kind::kFloat;
    case c10::TypeKind::BoolType: return Kind::kBool;
    case c10::TypeKind::StringType: return Kind::kString;
    case c10::TypeKind::ListType:
      switch (type.expectRef<c10::ListType>().getElementType()->kind()) {
        case c10::TypeKind::IntType: return Kind::kInts;
        case c10::TypeKind::TensorType: return Kind::kTensors;
        default: return Kind::kOther;
      }
    default: return Kind::kOther;
  }
}

Parameter parameter_of(const c10::Argument& argument) {
  c10::TypePtr type = argument.real_type();
  bool optional = false;
  if (const auto given = type->cast<c10::OptionalType>()) {
    type = given->getElementType();
    optional = true;
  }
  return {PyUnicode_InternFromString(argument.name().c_str()), kind_of(*type), optional, argument.default_value()};
}

bool read_int(PyObject* from, int64_t& to) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow = 0;
  to = PyLong_AsLongLongAndOverflow(from, &overflow);
  return overflow == 0;
}

// Whether `from` is plainly what the parameter takes.
bool read(PyObject* from, const Parameter& parameter, IValue& to) {
  int64_t number = 0;
  if (from == Py_None) return parameter.optional;
  switch (parameter.kind) {
    case Kind::kTensor:
      if (!THPVariable_CheckExact(from)) return false;
      to = THPVariable_Unpack(from);
      return true;
    case Kind::kInt:
      if (!read_int(from, number)) return false;
      to = number;
      return true;
    case Kind::kFloat:
      if (!PyFloat_CheckExact(from)) return false;
      to = PyFloat_AS_DOUBLE(from);
      return true;
    case Kind::kBool:
      if (!PyBool_Check(from)) return false;
      to = from == Py_True;
      return true;
    case Kind::kString: {
      Py_ssize_t length = 0;
      const char* const text = PyUnicode_CheckExact(from) ? PyUnicode_AsUTF8AndSize(from, &length) : nullptr;
      if (text == nullptr) {
        PyErr_Clear();
        return false;
      }
      to = std::string(text, length);
      return true;
    }
    case Kind::kDtype:
      if (!THPDtype_Check(from)) return false;
      to = static_cast<int64_t>(reinterpret_cast<THPDtype*>(from)->scalar_type);
      return true;
    case Kind::kInts: {
      if (!PyList_CheckExact(from)) return false;
      c10::List<int64_t> numbers;
      numbers.reserve(PyList_GET_SIZE(from));
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(from); ++i) {
        if (!read_int(PyList_GET_ITEM(from, i), number)) return false;
        numbers.push_back(number);
      }
      to = std::move(numbers);
      return true;
    }
    case Kind::kTensors: {
      if (!PyList_CheckExact(from)) return false;
      c10::List<at::Tensor> tensors;
      tensors.reserve(PyList_GET_SIZE(from));
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(from); ++i) {
        if (!THPVariable_CheckExact(PyList_GET_ITEM(from, i))) return false;
        tensors.push_back(THPVariable_Unpack(PyList_GET_ITEM(from, i)));
      }
      to = std::move(tensors);
      return true;
    }
    case Kind::kOther: return false;
  }
  return false;
}

// Whether the dispatcher would do nothing before it calls the kernel of the op's own key.
bool is_plain(const Op& op, const IValue* arguments, size_t count) {
  static const c10::DispatchKeySet passed_over =
      c10::autograd_dispatch_keyset | c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView,
                                                           c10::DispatchKey::BackendSelect,
                                                           c10::DispatchKey::AutocastCUDA,
                                                           c10::DispatchKey::AutocastCPU});
  const auto local = c10::impl::tls_local_dispatch_key_set();
  auto keys = local.included_;
  const bool recorded = c10::GradMode::is_enabled();
  const auto plain = [&](const IValue& argument) {
    if (!argument.isTensor()) return true;
    keys = keys | argument.toTensor().key_set();
    return !recorded || !argument.toTensor().requires_grad();
  };
  for (size_t i = 0; i < count; ++i) {
    if (arguments[i].isTensorList()) {
      const auto list = arguments[i].toListRef();
      if (!std::all_of(list.begin(), list.end(), plain)) return false;
    } else if (!plain(arguments[i])) {
      return false;
    }
  }
  keys = keys - local.excluded_ - passed_over;
  return keys.highestPriorityTypeId() == op.key && !at::impl::torch_function_mode_enabled() &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

// Where the argument of a name stands; the number of parameters if nowhere. Names in code are interned.
size_t place_of(const Op& op, PyObject* name) {
  size_t at = 0;
  while (at < op.parameters.size() && op.parameters[at].name != name) ++at;
  return at;
}

bool served(const Op& op, PyObject* const* given, size_t count, PyObject* keywords, std::vector<at::Tensor>& results) {
  const auto& parameters = op.parameters;
  const size_t named = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  if (count + named > parameters.size()) return false;
  c10::SmallVector<PyObject*, 16> objects(parameters.size(), nullptr);
  std::copy(given, given + count, objects.begin());
  for (size_t i = 0; i < named; ++i) {
    const size_t at = place_of(op, PyTuple_GET_ITEM(keywords, static_cast<Py_ssize_t>(i)));
    if (at == parameters.size() || objects[at] != nullptr) return false;
    objects[at] = given[count + i];
  }
  c10::SmallVector<IValue, 16> arguments(parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (objects[i] != nullptr) {
      if (!read(objects[i], parameters[i], arguments[i])) return false;
    } else if (parameters[i].given) {
      arguments[i] = *parameters[i].given;
    } else {
      return false;
    }
  }
  if (!is_plain(op, arguments.data(), arguments.size())) return false;
  const pybind11::gil_scoped_release released;
  return quartet::serve(*op.attached, arguments.data(), arguments.size(), results);
}

PyObject* direct_call(PyObject* self, PyObject* const* given, size_t flags, PyObject* keywords) {
  HANDLE_TH_ERRORS
  auto* const called = reinterpret_cast<DirectCall*>(self);
  std::vector<at::Tensor> results;
  if (!served(*called->op, given, PyVectorcall_NARGS(flags), keywords, results)) {
    return PyObject_Vectorcall(called->usual, given, flags, keywords);
  }
  if (called->op->results == Op::kOne) return THPVariable_Wrap(std::move(results[0]));
  const auto count = static_cast<Py_ssize_t>(results.size());
  const bool list = called->op->results == Op::kList;
  PyObject* const all = list ? PyList_New(count) : PyTuple_New(count);
  for (Py_ssize_t i = 0; all != nullptr && i < count; ++i) {
    PyObject* const result = THPVariable_Wrap(std::move(results[i]));
    list ? PyList_SET_ITEM(all, i, result) : PyTuple_SET_ITEM(all, i, result);
  }
  return all;
  END_HANDLE_TH_ERRORS
}

void forget(PyObject* self) {
  auto* const call = reinterpret_cast<DirectCall*>(self);
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(self));
  Py_XDECREF(call->usual);
  delete call->op;
  PyObject_Free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(DirectCall, call), READONLY, nullptr},
    {"usual", T_OBJECT_EX, offsetof(DirectCall, usual), READONLY, "what torch.ops called before"},
    {nullptr, 0, 0, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(forget)},
                       {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                       {Py_tp_members, members},
                       {0, nullptr}};

PyType_Spec spec = {"quartet.DirectCall", sizeof(DirectCall), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};

}  // namespace

// A new callable; with an error set, nullptr: no op of that name was attached.
extern "C" PyObject* quartet_direct_call(const char* called, PyObject* usual) {
  HANDLE_TH_ERRORS
  static PyObject* const type = PyType_FromSpec(&spec);
  if (type == nullptr) return nullptr;
  quartet::Attached* const attached = quartet::attached(called);
  TORCH_CHECK(attached != nullptr, called, " is not attached");
  auto op = std::make_unique<Op>();
  const auto& schema = quartet::schema_of(*attached);
  op->attached = attached;
  op->key = quartet::key_of(*attached);
  op->results = quartet::returns_list(schema) ? Op::kList : schema.returns().size() == 1 ? Op::kOne : Op::kTuple;
  for (const auto& argument : schema.arguments()) op->parameters.push_back(parameter_of(argument));
  auto* const made = PyObject_New(DirectCall, reinterpret_cast<PyTypeObject*>(type));
  if (made == nullptr) return nullptr;
  made->call = direct_call;
  made->usual = Py_NewRef(usual);
  made->op = op.release();
  return reinterpret_cast<PyObject*>(made);
  END_HANDLE_TH_ERRORS
}
