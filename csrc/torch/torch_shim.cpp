// The library as Python sees it: the operators' schemas, their registration with torch's dispatcher, and the builds of the kernels.
//
// No header of torch is included: the functions of its stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h and
// torch/csrc/stable/c/shim.h, unchanged from release to release) are looked up in the libtorch_cpu that `import torch` loaded. One
// library serves every torch from 2.11 and every Python.
#include <dlfcn.h>

#include "torch/node.h"
#include "torch/recompute.h"
#include "torch/verbs.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// The schema of operator `number`; null after the last.
EXPORT const char* batchnorm_schema(int number) {
    const Operator* each = Operator::first;
    while (each && number-- > 0) each = each->next;
    return each ? each->schema : nullptr;
}

// Registers the operators, whose schemas must be defined. Null, or what is missing.
EXPORT const char* batchnorm_register() {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) torch = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) return "libtorch_cpu is not loaded";
#define LOOK_UP(name, ...) \
    if (!(*(void**)& name = dlsym(torch, #name))) return "torch has no " #name;
    TORCH_FUNCTIONS(LOOK_UP)
#undef LOOK_UP
    *(void**)&torch_delete_stable_ivalue = dlsym(torch, "torch_delete_stable_ivalue");
    *(void**)&torch_exception_get_what_without_backtrace = dlsym(torch, "torch_exception_get_what_without_backtrace");
    cpu = aoti_torch_device_type_cpu();
    dtypes[(int)Dtype::float32] = aoti_torch_dtype_float32();
    dtypes[(int)Dtype::float64] = aoti_torch_dtype_float64();
    dtypes[(int)Dtype::bfloat16] = aoti_torch_dtype_bfloat16();
    dtypes[(int)Dtype::float16] = aoti_torch_dtype_float16();
    boolean = aoti_torch_dtype_bool();
    int64 = aoti_torch_dtype_int64();
    Handle library = nullptr;  // lives as long as the process
    if (aoti_torch_library_init_impl("batchnorm", "CPU", "torch_shim.cpp", __LINE__, &library))
        return "torch refused to extend the operator library";
    for (const Operator* each = Operator::first; each; each = each->next)
        if (aoti_torch_library_impl(library, each->name, each->run)) return "torch refused an operator";
    *(void**)&current_graph_task = dlsym(torch, "_ZN5torch8autograd25get_current_graph_task_idEv");
    if (current_graph_task && aoti_torch_library_impl(library, "recomputing", recomputing)) return "torch refused an operator";
    return nullptr;
}

// The operator of aten, and the key of the dispatcher, of kernel `number` for torch's node; null after the last.
EXPORT const char* batchnorm_operator_of_node(int number) {
    return number < (int)(sizeof of_torchs_node / sizeof *of_torchs_node) ? of_torchs_node[number].name : nullptr;
}
EXPORT const char* batchnorm_key_of_node(int number) {
    return number < (int)(sizeof of_torchs_node / sizeof *of_torchs_node) ? of_torchs_node[number].key : nullptr;
}

// Registers the kernels for torch's node, where there must be no others. Null, or what is missing.
EXPORT const char* batchnorm_register_in_torchs_node() {
    for (const auto& [name, key, run] : of_torchs_node) {
        Handle library = nullptr;  // likewise
        if (aoti_torch_library_init_impl("aten", key, "torch_shim.cpp", __LINE__, &library)) return "torch refused to extend aten";
        if (aoti_torch_library_impl(library, name, run)) return "torch refused a kernel of aten";
    }
    return nullptr;
}

// Sets what `bn.recomputation` says on this thread: 0, 1, or -1 for nothing.
EXPORT void batchnorm_say_recomputation(int recomputation) { said = recomputation; }

EXPORT const char* batchnorm_instruction_set() { return instruction_set(); }

// The name of activation `number`, "identity" first; null after the last.
EXPORT const char* batchnorm_activation_name(int number) {
#define NAME(name) #name,
    static const char* const names[] = {ACTIVATIONS(NAME) nullptr};
#undef NAME
    return names[number];
}

EXPORT const char* batchnorm_build_name(int number) { return build_name(number); }
