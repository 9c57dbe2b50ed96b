// float32 and float64, for one instruction set.
#include "kernels/kernels.h"

namespace {

// Under weights float32 has one storage type in each build.
template <bool rounds_once>
struct Float32UnderWeights {
    typedef Float32 Storage;
};
template <>
struct Float32UnderWeights<false> {
    typedef ExactFloat32 Storage;
};

}  // namespace

namespace batchnorm::BATCHNORM_ISA {

constexpr int64_t exact_values = Simd::multiply_add_rounds_once ? 4096 : INT64_MAX;  // 4096 take one microsecond in float64

void run_float(Task& task) {
    if (task.weights) {
        typedef Float32UnderWeights<Simd::multiply_add_rounds_once>::Storage Narrow;
        return task.dtype == Dtype::float64 ? Weighted<Float64>(task).run() : Weighted<Narrow>(task).run();
    }
    if (task.dtype == Dtype::float64) return run_storage<Float64>(task);
    const int64_t values = task.counted * task.C;
    values <= exact_values ? run_storage<ExactFloat32>(task) : run_storage<Float32>(task);
}

}  // namespace batchnorm::BATCHNORM_ISA
