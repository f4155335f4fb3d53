#pragma once

#include <nanobind/nanobind.h>

namespace sps::bind {

void bind_attention(nanobind::module_& m);
void bind_merge(nanobind::module_& m);
void bind_gemm(nanobind::module_& m);
void bind_packed(nanobind::module_& m);
void bind_memory(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_fence(nanobind::module_& m);
void bind_links(nanobind::module_& m);
void bind_moves(nanobind::module_& m);
void bind_sparse(nanobind::module_& m);
void bind_program(nanobind::module_& m);
void bind_step_loop(nanobind::module_& m);

// Runs handlers of signals that came, with the interpreter's lock; whether one raised. For waits.
bool signal_pending();

}  // namespace sps::bind
