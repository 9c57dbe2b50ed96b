// Torch's tensors through torch's stable C interface, and the arguments of an operator.
#pragma once

#include <stdint.h>
#include <string.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "api.h"
#include "torch/operators.h"

namespace {

using namespace batchnorm;

typedef void* Handle;

// The functions of libtorch that are used; each is looked up by its name. A result other than 0 is an error.
#define TORCH_FUNCTIONS(_)                                                                                            \
    _(aoti_torch_library_init_impl, int32_t, const char*, const char*, const char*, uint32_t, Handle*)                \
    _(aoti_torch_library_impl, int32_t, Handle, const char*, void (*)(StableIValue*, uint64_t, uint64_t))             \
    _(aoti_torch_get_data_ptr, int32_t, Handle, void**)                                                               \
    _(aoti_torch_get_sizes, int32_t, Handle, int64_t**)                                                               \
    _(aoti_torch_get_strides, int32_t, Handle, int64_t**)                                                             \
    _(aoti_torch_get_dim, int32_t, Handle, int64_t*)                                                                  \
    _(aoti_torch_get_dtype, int32_t, Handle, int32_t*)                                                                \
    _(aoti_torch_get_device_type, int32_t, Handle, int32_t*)                                                          \
    _(aoti_torch_get_storage_offset, int32_t, Handle, int64_t*)                                                       \
    _(aoti_torch_get_storage_size, int32_t, Handle, int64_t*)                                                         \
    _(aoti_torch_empty_strided, int32_t, int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*) \
    _(aoti_torch_copy_, int32_t, Handle, Handle, int32_t)                                                             \
    _(aoti_torch_call_dispatcher, int32_t, const char*, const char*, StableIValue*)                                   \
    _(aoti_torch_grad_mode_is_enabled, bool, void)                                                                    \
    _(aoti_torch_delete_tensor_object, int32_t, Handle)                                                               \
    _(aoti_torch_device_type_cpu, int32_t, void)                                                                      \
    _(aoti_torch_dtype_float32, int32_t, void)                                                                        \
    _(aoti_torch_dtype_float64, int32_t, void)                                                                        \
    _(aoti_torch_dtype_bfloat16, int32_t, void)                                                                       \
    _(aoti_torch_dtype_float16, int32_t, void)                                                                        \
    _(aoti_torch_dtype_bool, int32_t, void)                                                                           \
    _(aoti_torch_dtype_int64, int32_t, void)                                                                          \
    _(torch_get_num_threads, int32_t, uint32_t*)

#define DECLARE(name, result, ...) result (*name)(__VA_ARGS__);
TORCH_FUNCTIONS(DECLARE)
#undef DECLARE

int32_t (*torch_delete_stable_ivalue)(StableIValue*);         // from torch 2.13 on; older versions use `delete`
const char* (*torch_exception_get_what_without_backtrace)();  // likewise; older versions print it

int32_t cpu, dtypes[4], boolean, int64;

inline void check(int32_t error, const char* what) {
    if (!error) return;
    const char* const cause = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "";
    throw std::runtime_error(std::string("batchnorm: torch could not ") + what + (*cause ? ": " : "") + cause);
}

// Checks an argument that a Python caller could get wrong, before anything is read or written.
inline void expect(bool holds, const char* invariant) {
    if (!holds) throw std::invalid_argument(std::string("batchnorm: ") + invariant);
}

// The Dtype for torch's dtype; none for dtypes that are not floating, or that no kernel supports.
inline std::optional<Dtype> floating_dtype(int32_t dtype) {
    for (int ours = 0; ours < 4; ++ours)
        if (dtype == dtypes[ours]) return (Dtype)ours;
    return {};
}
inline bool is_floating(int32_t dtype) { return floating_dtype(dtype).has_value(); }

// The bytes of an element of the dtypes that are read here; 0 for others.
inline int64_t element_size_of(int32_t dtype) {
    if (const std::optional<Dtype> floating = floating_dtype(dtype)) return element_size(*floating);
    return dtype == int64 ? 8 : dtype == boolean;
}

// A tensor that this object owns, or none.
class Tensor {
  public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle(handle) {
        int64_t dimensions;
        check(aoti_torch_get_dim(handle, &dimensions), "read a tensor");
        aoti_torch_get_sizes(handle, &sizes);
        aoti_torch_get_strides(handle, &strides);
        aoti_torch_get_dtype(handle, &dtype);
        rank = (int)dimensions;
    }
    // An argument, which must be on the CPU and lie within its storage; FSDP, for example, frees storages.
    static Tensor argument(Handle handle) {
        Tensor tensor(handle);
        int32_t device = -1;
        int64_t offset = 0, bytes = 0, last = 0;
        check(aoti_torch_get_device_type(handle, &device), "read a tensor's device");
        expect(device == cpu, "every tensor must be on the CPU");
        if (tensor.values() == 0) return tensor;
        check(aoti_torch_get_storage_offset(handle, &offset) | aoti_torch_get_storage_size(handle, &bytes), "read a tensor's storage");
        for (int axis = 0; axis < tensor.rank; ++axis) last += (tensor.sizes[axis] - 1) * tensor.strides[axis];
        expect((offset + last + 1) * element_size_of(tensor.dtype) <= bytes, "a tensor's storage must not be smaller than the tensor");
        return tensor;
    }
    Tensor(Tensor&& other) noexcept { swap(other); }
    Tensor& operator=(Tensor&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Tensor() {
        if (handle) aoti_torch_delete_tensor_object(handle);
    }

    static Tensor empty(int rank, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
        Handle handle;
        check(aoti_torch_empty_strided(rank, sizes, strides, dtype, cpu, 0, &handle), "allocate a tensor");
        return Tensor(handle);
    }
    static Tensor vector(int64_t size, int32_t dtype) {
        const int64_t stride = 1;
        return empty(1, &size, &stride, dtype);
    }
    Tensor empty_like() const { return empty(rank, sizes, strides, dtype); }

    explicit operator bool() const { return handle; }
    StableIValue release() {
        const StableIValue word = (StableIValue)handle;
        handle = nullptr;
        return word;
    }
    template <class T>
    T* data() const {
        void* pointer = nullptr;
        if (handle) aoti_torch_get_data_ptr(handle, &pointer);
        return (T*)pointer;
    }
    int64_t values() const {
        int64_t product = 1;
        for (int axis = 0; axis < rank; ++axis) product *= sizes[axis];
        return product;
    }
    bool has_sizes_of(const Tensor& other) const { return rank == other.rank && !memcmp(sizes, other.sizes, rank * sizeof *sizes); }
    bool is_contiguous() const {
        if (values() == 0) return true;
        int64_t stride = 1;
        for (int axis = rank - 1; axis >= 0; stride *= sizes[axis--])
            if (sizes[axis] > 1 && strides[axis] != stride) return false;
        return true;
    }
    bool has_layout_of(const Tensor& other) const {
        if (dtype != other.dtype || rank != other.rank) return false;
        for (int axis = 0; axis < rank; ++axis)
            if (sizes[axis] != other.sizes[axis] || (sizes[axis] > 1 && strides[axis] != other.strides[axis])) return false;
        return true;
    }

    Handle handle = nullptr;
    int64_t *sizes = nullptr, *strides = nullptr;
    int rank = 0;
    int32_t dtype = 0;

  private:
    void swap(Tensor& other) {
        std::swap(handle, other.handle);
        std::swap(sizes, other.sizes);
        std::swap(strides, other.strides);
        std::swap(rank, other.rank);
        std::swap(dtype, other.dtype);
    }
};

// Reads the arguments of an operator from its stack, in the order of its signature, and frees those that were not read: an operator that
// raises stops at one.
class Arguments {
  public:
    Arguments(StableIValue* stack, uint64_t count, const char* signature)
        : first(stack), at(stack), end(stack + count), signature(signature) {}
    Arguments(const Arguments&) = delete;
    ~Arguments() {
        if (at != end) free_the_rest();
    }
    Tensor tensor() { return Tensor::argument((Handle)*at++); }
    Tensor optional_tensor() {
        const Handle handle = unboxed();
        return handle ? Tensor::argument(handle) : Tensor();
    }
    // Skips an optional tensor, which torch's node may pass without a value, and returns whether something was passed.
    bool skip_optional() {
        const Handle handle = unboxed();
        if (handle) aoti_torch_delete_tensor_object(handle);
        return handle;
    }
    double number() {
        double value;
        memcpy(&value, at++, sizeof value);
        return value;
    }
    int64_t integer() { return (int64_t)*at++; }
    bool flag() {
        bool value;
        memcpy(&value, at++, sizeof value);
        return value;
    }

  private:
    const StableIValue* const first;
    StableIValue *at, *const end;
    const char* const signature;

    // The handle of an optional tensor, or null.
    Handle unboxed() {
        StableIValue* const boxed = (StableIValue*)*at++;
        if (!boxed) return nullptr;
        const Handle handle = (Handle)*boxed;
        if (torch_delete_stable_ivalue) {
            torch_delete_stable_ivalue(boxed);
        } else {
            delete boxed;
        }
        return handle;
    }

    void free_the_rest() {
        const char* argument = signature;  // "Tensor? bias, float eps" and so on
        for (const StableIValue* read = first; read != at; ++read) argument = strchr(argument, ',') + 2;
        while (at != end) {
            const char* const comma = strchr(argument, ',');
            const char* const name = strchr(argument, ' ');
            const bool is_tensor = !strncmp(argument, "Tensor", strlen("Tensor"));
            if (!is_tensor) {
                ++at;
            } else if (name[-1] == '?') {
                skip_optional();
            } else {
                aoti_torch_delete_tensor_object((Handle)*at++);
            }
            if (comma) argument = comma + 2;
        }
    }
};

// Defines an operator of the table; its body has `arguments`, and leaves the results on `stack`.
#define OPERATOR(name, signature, results)                                            \
    void name(Arguments& arguments, StableIValue* stack);                             \
    void name(StableIValue* stack, uint64_t count, uint64_t) {                        \
        Arguments arguments(stack, count, signature);                                 \
        name(arguments, stack);                                                       \
    }                                                                                 \
    const Operator name##_operator(#name, #name "(" signature ") -> " results, name); \
    void name(Arguments& arguments, StableIValue* stack)

// Uninitialized memory; never null.
typedef std::unique_ptr<double[]> Scratch;
inline Scratch scratch(int64_t values) { return Scratch(new double[values + 1]); }

// The values of a (C,) tensor in float64: the tensor's own memory if it is float64 and contiguous, otherwise a copy.
class ChannelValues {
  public:
    ChannelValues() = default;
    ChannelValues(const Tensor& tensor, int64_t C) {
        if (!tensor) return;
        expect(tensor.rank == 1 && tensor.sizes[0] == C, "parameters and statistics must be (C,)");
        expect(is_floating(tensor.dtype), "parameters and statistics must be floating");
        const int64_t stride = tensor.strides[0];
        if (tensor.dtype == dtypes[(int)Dtype::float64] && (stride == 1 || C == 1)) {
            values = tensor.data<double>();
            return;
        }
        own = scratch(C);
        values = own.get();
        if (tensor.dtype == dtypes[(int)Dtype::float32]) {
            const float* narrow = tensor.data<float>();
            if (stride == 1) {  // a loop that the compiler turns into vectors
                for (int64_t c = 0; c < C; ++c) values[c] = narrow[c];
            } else {
                for (int64_t c = 0; c < C; ++c) values[c] = narrow[c * stride];
            }
        } else {
            for (int64_t c = 0; c < C; ++c) values[c] = read(tensor, c * stride);
        }
    }
    operator double*() const { return values; }

    // The value of a tensor of one element.
    static double number(const Tensor& tensor) {
        expect(tensor.values() == 1 && is_floating(tensor.dtype), "a count or a bound must be one floating number");
        return read(tensor, 0);
    }

  private:
    static double read(const Tensor& tensor, int64_t i) {
        if (tensor.dtype == dtypes[(int)Dtype::float32]) return tensor.data<float>()[i];
        if (tensor.dtype == dtypes[(int)Dtype::float64]) return tensor.data<double>()[i];
        if (tensor.dtype == dtypes[(int)Dtype::bfloat16]) {
            const uint32_t bits = (uint32_t)tensor.data<uint16_t>()[i] << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            return value;
        }
        const uint32_t half = tensor.data<uint16_t>()[i], magnitude = (half & 0x7fff) << 13;
        uint32_t bits = magnitude;
        float value;
        memcpy(&value, &bits, sizeof value);
        value *= 0x1p112f;  // exact, also for subnormal numbers
        memcpy(&bits, &value, sizeof bits);
        if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
        bits |= (half & 0x8000) << 16;
        memcpy(&value, &bits, sizeof value);
        return value;
    }

    double* values = nullptr;
    Scratch own;
};

// The same as the kernels take parameters and running statistics: float32 is not copied either.
class ChannelOperand {
  public:
    ChannelOperand(const Tensor& tensor, int64_t C) {
        const bool fits = tensor && tensor.rank == 1 && tensor.sizes[0] == C && (tensor.strides[0] == 1 || C == 1);
        if (fits && tensor.dtype == dtypes[(int)Dtype::float32]) {
            values = tensor.data<float>();
        } else {
            copy = ChannelValues(tensor, C);
            values = static_cast<const double*>(copy);
        }
    }
    operator batchnorm::ChannelVector() const { return values; }

  private:
    batchnorm::ChannelVector values;
    ChannelValues copy;
};

}  // namespace
