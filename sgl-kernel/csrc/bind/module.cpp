#include "bind/module.h"

#include <nanobind/stl/string.h>

#include "sps/cpu.h"
#include "sps/thread_pool.h"

namespace nb = nanobind;

namespace {

nb::dict cpu_features() {
  nb::dict d;
  for (const auto& [name, present] : sps::cpu_features()) d[name.c_str()] = present;
  return d;
}

nb::list available_isas() {
  nb::list l;
  for (sps::Isa isa : sps::available_isas()) l.append(sps::isa_name(isa));
  return l;
}

}  // namespace

bool sps::bind::signal_pending() {
  nb::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

NB_MODULE(_core, m) {
  // A process that ends with links and programs alive is no mistake: ranks keep theirs to the end.
  nb::set_leak_warnings(false);
  m.def("cpu_features", &cpu_features);
  m.def("available_isas", &available_isas);
  m.def("current_isa", [] { return sps::isa_name(sps::current_isa()); });
  m.def("set_isa", &sps::set_isa, nb::arg("name"));
  m.def("set_pool_spin", [](double seconds) {
    if (!(seconds >= 0 && seconds < 1)) throw nb::value_error("seconds must be in [0, 1)");
    sps::set_pool_spin(seconds);
  });
  m.attr("compiler") = __VERSION__;
#ifdef __SANITIZE_ADDRESS__
  m.attr("sanitized") = true;
#else
  m.attr("sanitized") = false;
#endif
  sps::bind::bind_attention(m);
  sps::bind::bind_merge(m);
  sps::bind::bind_gemm(m);
  sps::bind::bind_packed(m);
  sps::bind::bind_memory(m);
  sps::bind::bind_elementwise(m);
  sps::bind::bind_sampling(m);
  sps::bind::bind_fence(m);
  sps::bind::bind_links(m);
  sps::bind::bind_moves(m);
  sps::bind::bind_sparse(m);
  sps::bind::bind_program(m);
  sps::bind::bind_step_loop(m);
}
