// Runs every verb on random shapes under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`). Each tensor is a heap block of
// exactly its size, at any alignment that its dtype allows, or it begins or ends at an inaccessible page, which catches masked loads and
// stores too. The results must be bit-identical on one, two and three threads.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <random>
#include <vector>

#include "api.h"

using namespace batchnorm;

namespace {

std::mt19937 numbers(0);

int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[numbers() % values.size()]; }

constexpr int64_t page = 4096;

// `size` bytes: a heap block from byte `shift` to its end, or memory that begins or ends at an inaccessible page.
class Block {
  public:
    Block(int64_t size, int64_t shift) : size(size) {
        if (numbers() % 2) {
            bytes = (char*)malloc(size + shift), first = bytes + shift;
        } else {
            const int64_t room = (size + page - 1) / page * page;
            mapped = room + 2 * page;
            bytes = (char*)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            mprotect(bytes, page, PROT_NONE), mprotect(bytes + page + room, page, PROT_NONE);
            first = bytes + page + (numbers() % 2 ? 0 : room - size);
        }
        for (int64_t i = 0; i < size; ++i) first[i] = (char)(numbers() % 64);
    }
    ~Block() { mapped ? (void)munmap(bytes, mapped) : free(bytes); }
    Block(const Block&) = delete;

    void* data() { return first; }
    // value(i) plus noise.
    template <class Value>
    void fill(const Value& value, Dtype dtype, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            const double noisy = value(i) + (double)(numbers() % 1000) / 250.0 - 2.0;
            if (dtype == Dtype::float64) ((double*)data())[i] = noisy;
            if (dtype == Dtype::float32) ((float*)data())[i] = (float)noisy;
            if (dtype == Dtype::bfloat16) ((uint16_t*)data())[i] = (uint16_t)(0x3f80 + numbers() % 256);
            if (dtype == Dtype::float16) ((uint16_t*)data())[i] = (uint16_t)(0x3c00 + numbers() % 1024);
        }
    }
    uint64_t hash() const {
        uint64_t value = 14695981039346656037u;
        for (int64_t i = 0; i < size; ++i) value = (value ^ (uint8_t)first[i]) * 1099511628211u;
        return value;
    }

  private:
    char *bytes, *first;
    int64_t size, mapped = 0;
};

// Runs one random call on one, two and three threads; returns the hash of its results.
uint64_t fuzz_one() {
    Task task = {};
    task.verb = (Verb)(numbers() % 6);
    task.dtype = (Dtype)(numbers() % 4);
    task.interleaved = numbers() % 2;
    task.N = one_of({1, 2, 3, 17, 64});
    task.C = one_of({1, 2, 3, 13, 64, 65, 131});
    task.S = one_of({1, 2, 3, 7, 15, 16, 17, 49, 101, 128, 196, 301, 511, 512, 1031});
    if (numbers() % 16 == 0) task.N = 1, task.C = one_of({1, 2}), task.S = 140001;
    const int64_t values = task.N * task.C * task.S, size = element_size(task.dtype);
    const bool backward = task.verb == Verb::backward || task.verb == Verb::input_grad || task.verb == Verb::reduce_grad;
    const int64_t shift = numbers() % 2 ? 64 : size * (numbers() % 32);
    Block x(values * size, shift), dy(values * size, shift), residual(values * size, shift), mask(task.N * task.S, 0);
    // The mean of some channels is so large that their sums are computed again.
    const double far = (double)one_of({3, 1000, 100000});
    const auto mean_of = [&](int64_t i) { return (task.interleaved ? i : i / task.S) % task.C % 3 ? 3.0 : far; };
    x.fill(mean_of, task.dtype, values);
    dy.fill([](int64_t) { return 0.0; }, task.dtype, values), residual.fill([](int64_t) { return 1.0; }, task.dtype, values);
    const int64_t together = one_of({1, 1, 5, 300});
    for (int64_t i = 0, counts = 0; i < task.N * task.S; ++i) {
        if (i % together == 0) counts = numbers() % 4 != 0;
        ((uint8_t*)mask.data())[i] = (uint8_t)counts;
    }
    task.x = x.data();
    if (backward) task.dy = dy.data();
    if (numbers() % 2 && task.verb != Verb::moments) task.residual = residual.data();
    task.residual_is_output = backward && task.residual && numbers() % 2;
    if (numbers() % 2) task.mask = (uint8_t*)mask.data();
    task.count = (double)(task.N * task.S), task.eps = 1e-5;
    task.activation = (Activation)(numbers() % activations), task.slope = 0.01;
    task.from_memory = numbers() % 2;
    task.group_size = one_of({1, 2, 5});
    task.groups = numbers() % 3 ? 0 : task.N / task.group_size;
    Block weights(task.N * task.S * 8, 0);
    for (int64_t i = 0; i < task.N * task.S; ++i) ((double*)weights.data())[i] = (double)(numbers() % 16) / 4.0 - 1.0;
    const bool takes_weights = task.verb == Verb::moments || task.verb == Verb::input_grad;
    if (takes_weights && !task.mask && task.groups <= 1 && numbers() % 2) task.weights = (double*)weights.data();
    const int64_t vectors = task.C * (task.groups > 1 ? task.groups : 1);
    const bool renormalized = task.verb == Verb::forward && task.groups <= 1 && numbers() % 2;

    uint64_t first = 0;
    std::vector<double> weight(task.C, 1.25), bias(task.C, 0.5), zeros(vectors, 0.0);
    for (int threads = 1; threads <= 3; ++threads) {
        std::vector<double> mean(vectors, 3.0), m2(vectors), rstd(vectors, 0.5), sum(vectors), product(vectors), counts(task.N);
        std::vector<double> r(task.C), d(task.C);
        task.counts = counts.data();
        Block output(values * size, shift), dresidual(values * size, shift);
        task.weight = weight.data(), task.bias = bias.data();
        task.mean = mean.data(), task.m2 = m2.data(), task.rstd = task.verb == Verb::moments ? nullptr : rstd.data();
        task.sum_grad = sum.data(), task.sum_grad_xhat = product.data();
        task.mean_grad = task.mean_grad_xhat = zeros.data();
        task.running_mean = bias.data(), task.running_var = weight.data(), task.r_max = 1.5, task.d_max = 0.5;
        task.r = renormalized ? r.data() : nullptr, task.d = renormalized ? d.data() : nullptr;
        const bool maps = task.verb != Verb::moments && task.verb != Verb::reduce_grad;
        task.output = maps ? output.data() : nullptr;
        task.dresidual = backward && maps && task.residual ? dresidual.data() : nullptr;
        task.threads = threads;
        Task call = task;
        run(call);
        uint64_t bits = maps ? output.hash() : 0;
        if (task.dresidual) bits = bits * 31 + dresidual.hash();
        for (const auto* values : {&mean, &m2, &rstd, &sum, &product, &r, &d})
            for (double value : *values) {
                uint64_t word;
                memcpy(&word, &value, sizeof word);
                bits = bits * 31 + word;
            }
        if (threads == 1) first = bits;
        if (bits != first) {
            printf("verb %d, dtype %d, (%ld, %ld, %ld), interleaved %d: other bits with %d threads\n", (int)task.verb, (int)task.dtype,
                   (long)task.N, (long)task.C, (long)task.S, task.interleaved, threads);
            exit(1);
        }
    }
    return first;
}

}  // namespace

// `fuzz CALLS` looks for faults; `fuzz CALLS hashes` also prints a hash for each call, to compare two commits.
int main(int, char** arguments) {
    const int runs = arguments[1] ? atoi(arguments[1]) : 1000;
    const bool hashes = arguments[1] && arguments[2];
    for (int i = 0; i < runs; ++i) {
        const uint64_t hash = fuzz_one();
        if (hashes) printf("%d %016llx\n", i, (unsigned long long)hash);
    }
    printf("%d calls, %s: nothing found\n", runs, instruction_set());
}
