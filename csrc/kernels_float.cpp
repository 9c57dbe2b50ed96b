// float32 and float64, for one instruction set.
#include "kernels.h"

namespace batchnorm::BATCHNORM_ISA {

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr int64_t exact_values = 4096;  // one microsecond of float64 arithmetic
#else
constexpr int64_t exact_values = INT64_MAX;
#endif

void run_float(Task& task) {
    if (task.dtype == Dtype::float64) return run_storage<Float64>(task);
    task.counted * task.C <= exact_values ? run_storage<ExactFloat32>(task) : run_storage<Float32>(task);
}

}  // namespace batchnorm::BATCHNORM_ISA
