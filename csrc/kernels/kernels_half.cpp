// bfloat16 and float16, for one instruction set.
#include "kernels/kernels.h"

namespace batchnorm::BATCHNORM_ISA {

void run_half(Task& task) {
    if (task.weights) return task.dtype == Dtype::bfloat16 ? Weighted<BFloat16>(task).run() : Weighted<Float16>(task).run();
    task.dtype == Dtype::bfloat16 ? run_storage<BFloat16>(task) : run_storage<Float16>(task);
}

}  // namespace batchnorm::BATCHNORM_ISA
