// Python's view of the links between ranks.
#include <cmath>
#include <cstring>
#include <memory>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/links.h"

namespace sps::bind {
namespace {

// Links over a buffer that they keep alive, as recorded exchanges keep them.
class PyLinks {
 public:
  PyLinks(nb::handle memory, int rank, int world, int64_t ring_bytes, double timeout_s,
          double spin_us)
      : object_(nb::borrow(memory)), buffer_(memory, "memory", true) {
    refuse_recording("opening links");
    if (world < 1 || rank < 0 || rank >= world) value_error("rank lies outside the world");
    if (ring_bytes < Links::kLine || ring_bytes % Links::kLine != 0)
      value_error("ring_bytes must be a multiple of 64");
    if (!(timeout_s > 0) || !(spin_us >= 0)) value_error("timeout_s and spin_us: not negative");
    buffer_.need_dtype(DType::kU8).need_contiguous();
    if (buffer_.size() < Links::region_bytes(world, ring_bytes))
      value_error("memory: smaller than its links");
    if (reinterpret_cast<uintptr_t>(buffer_.data) % 8 != 0) value_error("memory: not aligned");
    links_ = std::make_shared<Links>(buffer_.data, rank, world, ring_bytes, timeout_s, spin_us);
  }

  Links& links() const { return *links_; }

 private:
  nb::object object_;
  Tensor buffer_;
  std::shared_ptr<Links> links_;
};

struct OwnCopy {
  const char* from;
  char* to;
  size_t bytes;
};

struct Exchange {
  Links* links;
  std::vector<Message> out, in;
  OwnCopy own;

  void operator()() const {
    if (own.bytes > 0) std::memcpy(own.to, own.from, own.bytes);
    std::vector<Message> sending(out), receiving(in);
    links->exchange(sending, receiving, &signal_pending);
  }
};

void add(Exchange& e, int peer, const Tensor& send, const Tensor& recv) {
  const int64_t sent = send.size() * send.item_bytes(), got = recv.size() * recv.item_bytes();
  if (peer == e.links->rank()) {
    if (sent != got) value_error("a message to oneself must have one size");
    if (send.data != recv.data) e.own = {send.data, recv.data, static_cast<size_t>(sent)};
    return;
  }
  if (sent > 0) e.out.push_back({peer, send.data, sent});
  if (got > 0) e.in.push_back({peer, recv.data, got});
}

void exchange(nb::handle self, nb::sequence members, nb::sequence send, nb::sequence recv) {
  const size_t n = nb::len(members);
  if (nb::len(send) != n || nb::len(recv) != n) value_error("need a message per member, each way");
  Exchange e{&nb::cast<PyLinks&>(self).links(), {}, {}, {nullptr, nullptr, 0}};
  std::vector<nb::object> objects{nb::borrow(self)};
  for (size_t i = 0; i < n; ++i) {
    const int peer = nb::cast<int>(members[i]);
    if (peer < 0 || peer >= e.links->world()) value_error("a member lies outside the world");
    objects.push_back(nb::object(send[i]));
    const Tensor from(objects.back(), "send");
    objects.push_back(nb::object(recv[i]));
    const Tensor to(objects.back(), "recv", true);
    from.need_contiguous();
    to.need_contiguous();
    add(e, peer, from, to);
  }
  std::vector<nb::handle> keep(objects.begin(), objects.end());
  submit("exchange", keep, std::move(e));
}

}  // namespace

void bind_links(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const ConnectionLost& error) {
      PyErr_SetString(PyExc_ConnectionError, error.what());
    } catch (const Interrupted&) {
      // The signal's handler has set its exception.
    }
  });
  nb::class_<PyLinks>(m, "Links")
      .def(nb::init<nb::handle, int, int, int64_t, double, double>(), nb::arg("memory"),
           nb::arg("rank"), nb::arg("world"), nb::arg("ring_bytes"), nb::arg("timeout_s"),
           nb::arg("spin_us"))
      .def("exchange", &exchange)
      .def("take_waited", [](const PyLinks& self) { return self.links().take_waited(); });
  m.def("links_region_bytes", &Links::region_bytes);
}

}  // namespace sps::bind
