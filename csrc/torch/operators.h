// The table of operators: each is defined by OPERATOR (tensors.h), which puts its schema beside its function. Python reads the schemas from the
// library and declares them to torch; batchnorm_register then gives torch the functions.
//
// An operator receives its arguments in the order of its schema, each as a StableIValue of 64 bits (torch/csrc/stable): a tensor is an
// owned handle, an optional one a pointer to such a value or null, numbers and flags lie in the low bytes. It leaves its results in the
// same place.
#pragma once

#include <stdint.h>

namespace {

typedef uint64_t StableIValue;

typedef void (*Run)(StableIValue* stack, uint64_t arguments, uint64_t results);

struct Operator {
    const char *name, *schema;
    Run run;
    const Operator* next;

    Operator(const char* name, const char* schema, Run run) : name(name), schema(schema), run(run), next(first) { first = this; }

    static inline const Operator* first = nullptr;  // of the table: the one that was defined last
};

}  // namespace

// Arguments that several operators share.
#define ACTIVATION_ARGUMENTS "int activation, float slope"
#define EPILOGUE_ARGUMENTS "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, " ACTIVATION_ARGUMENTS
