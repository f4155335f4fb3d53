// A recorded step run again and again, each from the tokens of the one before, without the
// interpreter in between: decoding of a batch that does not change.
#include <nanobind/stl/pair.h>
#include <poll.h>

#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "bind/module.h"
#include "bind/program.h"
#include "sps/links.h"
#include "sps/sampling.h"
#include "sps/token_board.h"

namespace sps::bind {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kGoOn = 1;  // a verdict; any other ends the loop

struct TimedOut : std::runtime_error {
  using std::runtime_error::runtime_error;
};

bool readable(int descriptor) {
  pollfd p{descriptor, POLLIN, 0};
  return descriptor >= 0 && poll(&p, 1, 0) > 0;
}

std::vector<int64_t> values_of(nb::handle array, const char* name) {
  const Tensor t(array, name);
  t.need_dtype(DType::kI64).need_contiguous();
  return {t.as<int64_t>(), t.as<int64_t>() + t.size()};
}

// An array that every step finds with other values: `values` [steps, ...] has them all.
struct Feed {
  Tensor to, values;

  Feed(nb::handle to_, nb::handle values_) : to(to_, "to", true), values(values_, "values") {
    to.need_contiguous();
    values.need_ndim(to.ndim + 1).need_dtype(to.dtype).need_contiguous();
    if (values.size() != values.shape[0] * to.size())
      value_error("a feed's values must have the shape of what they go to, for every step");
  }
  void put(int64_t step) const {
    const size_t bytes = static_cast<size_t>(to.size() * to.item_bytes());
    std::memcpy(to.data, values.data + static_cast<size_t>(step) * bytes, bytes);
  }
};

class StepLoop {
 public:
  StepLoop(Program& program, nb::handle logits, nb::handle tokens, nb::sequence feeds,
           nb::handle board, nb::handle slots, int64_t epoch, int64_t verdict, double spin_us)
      : program_(program),
        logits_((refuse_recording("a loop of steps"), logits), "logits"),
        tokens_(tokens, "tokens", true),
        memory_(board, "board", true),
        board_(memory_.data, spin_us),
        slots_(values_of(slots, "slots")),
        epoch_(epoch),
        verdict_(verdict) {
    for (nb::handle object : {logits, tokens, board}) keep_.push_back(nb::borrow(object));
    logits_.need_dtype(DType::kF32).need_shape({rows(), -1}).need_contiguous();
    tokens_.need_dtype(DType::kI64).need_shape({rows()}).need_contiguous();
    if (logits_.size() == 0) value_error("logits: empty");
    check_board(memory_);
    for (nb::handle pair : feeds) add_feed(pair);
  }

  int64_t lead(int64_t first, int64_t last, bool each, nb::handle sampled, nb::handle stops,
               double seconds, int descriptor) {
    check_steps(first, last);
    const Sampling sampling = sampling_of(sampled, stops, last);
    const Clock::time_point until = Clock::now() + to_duration(seconds);
    int64_t next = first;
    if (!goes_on_) say_go_on(next - 1);
    program_.run_while([&] {
      if (next > first) {
        if (sampling.tokens == nullptr) return goes_on_ = false;
        const bool stopped = sample(sampling, next - 1);
        goes_on_ = next <= last && !stopped && Clock::now() <= until && !readable(descriptor);
        if (goes_on_) say_go_on(next - 1);
        if (!goes_on_ || each) return false;
      }
      prepare(next++);
      return true;
    });
    if (!goes_on_) board_.ring();
    return next - first;
  }

  bool goes_on() const { return goes_on_; }

  int64_t follow(int64_t first, int64_t last, double timeout_s) {
    check_steps(first, last);
    if (verdict_ < 0) value_error("who follows needs the slot of verdicts");
    int64_t next = first;
    program_.run_while([&] {
      if (next > last || !told_to_go_on(next - 1, timeout_s)) return false;
      prepare(next++);
      return true;
    });
    return next - first;
  }

  double waited_s() const { return waited_s_; }

 private:
  // Where sampled ids go, [steps, rows]; null: the caller samples. Pairs (row, id) end the loop.
  struct Sampling {
    int64_t* tokens = nullptr;
    std::vector<int64_t> stops;
  };

  int64_t rows() const { return static_cast<int64_t>(slots_.size()); }
  uint32_t epoch_of(int64_t step) const { return static_cast<uint32_t>(epoch_ + step); }

  static Clock::duration to_duration(double seconds) {
    if (!(seconds >= 0 && seconds < 1e6)) value_error("seconds must be in [0, 1e6)");
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }

  void add_feed(nb::handle pair) {
    const auto arrays = nb::cast<std::pair<nb::object, nb::object>>(pair);
    feeds_.emplace_back(arrays.first, arrays.second);
    keep_.push_back(arrays.first);
    keep_.push_back(arrays.second);
  }

  void check_board(const Tensor& memory) const {
    memory.need_ndim(1).need_dtype(DType::kU8).need_contiguous();
    if (reinterpret_cast<uintptr_t>(memory.data) % 8 != 0) value_error("board: not aligned");
    const int64_t words = (memory.size() - TokenBoard::kLine) / 8;
    for (int64_t slot : slots_)
      if (slot < 0 || slot >= words) value_error("a slot lies outside of the board");
    if (verdict_ >= words) value_error("the slot of verdicts lies outside of the board");
  }

  void check_steps(int64_t first, int64_t last) const {
    if (first < 1 || last < first) value_error("steps: 1 <= first <= last");
    for (const Feed& feed : feeds_)
      if (last >= feed.values.shape[0]) value_error("a feed has no values for the last step");
  }

  Sampling sampling_of(nb::handle sampled, nb::handle stops, int64_t last) const {
    if (sampled.is_none()) return {};
    const Tensor out(sampled, "sampled", true);
    out.need_dtype(DType::kI64).need_shape({-1, rows()}).need_contiguous();
    if (last >= out.shape[0]) value_error("sampled: no room for the last step");
    Sampling sampling{out.as<int64_t>(), values_of(stops, "stops")};
    if (sampling.stops.size() % 2 != 0) value_error("stops: need pairs of row and id");
    return sampling;
  }

  // What the step before sampled becomes this one's input.
  void prepare(int64_t step) {
    int64_t* tokens = tokens_.as<int64_t>();
    for (int64_t row = 0; row < rows(); ++row) {
      uint32_t token;
      if (!board_.get(slots_[row], epoch_of(step - 1), token))
        throw std::runtime_error("the board lacks the token of slot " +
                                 std::to_string(slots_[row]));
      tokens[row] = token;
    }
    for (const Feed& feed : feeds_) feed.put(step);
  }

  // Each row's largest logit, onto the board; whether a row is at its end.
  bool sample(const Sampling& sampling, int64_t step) {
    const int64_t vocab = logits_.shape[1];
    int64_t* chosen = sampling.tokens + step * rows();
    for (int64_t row = 0; row < rows(); ++row) {
      chosen[row] = largest(logits_.as<float>() + row * vocab, vocab);
      board_.put(slots_[row], epoch_of(step), static_cast<uint32_t>(chosen[row]));
    }
    for (size_t i = 0; i < sampling.stops.size(); i += 2) {
      const int64_t row = sampling.stops[i];
      if (row >= 0 && row < rows() && chosen[row] == sampling.stops[i + 1]) return true;
    }
    return false;
  }

  void say_go_on(int64_t step) {
    if (verdict_ < 0) return;
    board_.put(verdict_, epoch_of(step), kGoOn);
    board_.ring();
  }

  bool told_to_go_on(int64_t step, double timeout_s) {
    const Clock::time_point began = Clock::now();
    uint32_t verdict = 0;
    bool interrupted = false;
    const bool came = board_.wait(verdict_, epoch_of(step), timeout_s, &signal_pending, verdict);
    waited_s_ += std::chrono::duration<double>(Clock::now() - began).count();
    if (came) return verdict == kGoOn;
    {
      nb::gil_scoped_acquire gil;
      interrupted = PyErr_Occurred() != nullptr;
    }
    if (interrupted) throw Interrupted();
    throw TimedOut("no verdict in board slot " + std::to_string(verdict_));
  }

  Program& program_;
  std::vector<nb::object> keep_;
  Tensor logits_, tokens_, memory_;
  TokenBoard board_;
  std::vector<int64_t> slots_;
  std::vector<Feed> feeds_;
  int64_t epoch_, verdict_;
  double waited_s_ = 0;
  bool goes_on_ = false;  // as the leading rank has said of the newest step
};

}  // namespace

void bind_step_loop(nb::module_& m) {
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const TimedOut& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    }
  });
  nb::class_<StepLoop>(m, "StepLoop")
      .def(nb::init<Program&, nb::handle, nb::handle, nb::sequence, nb::handle, nb::handle,
                    int64_t, int64_t, double>(),
           nb::keep_alive<1, 2>())
      .def("lead", &StepLoop::lead, nb::arg("first"), nb::arg("last"), nb::arg("each"),
           nb::arg("sampled").none(), nb::arg("stops").none(), nb::arg("seconds"),
           nb::arg("descriptor"))
      .def_prop_ro("goes_on", &StepLoop::goes_on)
      .def("follow", &StepLoop::follow)
      .def_prop_ro("waited_s", &StepLoop::waited_s);
}

}  // namespace sps::bind
