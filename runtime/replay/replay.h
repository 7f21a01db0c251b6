// What direct_call.cpp needs of replay.cpp.
#pragma once

#include <string>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>

namespace quartet {

struct Attached;  // an op whose kernels are launched from here

// The op of a name such as "cuda_fold" or "cuda_fold.triton"; nullptr where none was ever attached.
Attached* attached(const std::string& called);

// Whether the one result is a list of tensors.
bool returns_list(const c10::FunctionSchema& schema);

const c10::FunctionSchema& schema_of(const Attached& op);
c10::DispatchKey key_of(const Attached& op);

// Serves a call if it has a plan. Where it has none nothing has happened; `arguments` may lose the op's owner otherwise.
bool serve(Attached& op, c10::IValue* arguments, size_t count, std::vector<at::Tensor>& results);

}  // namespace quartet
