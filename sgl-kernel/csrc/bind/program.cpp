#include "bind/program.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "bind/module.h"

namespace sps::bind {
namespace {

thread_local Program* current = nullptr;

int64_t now_ns() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

[[noreturn]] void runtime_error(const std::string& message) { throw std::runtime_error(message); }

}  // namespace

Program* recording() { return current; }

void refuse_recording(const char* what) {
  if (current != nullptr) current->spoil(std::string(what) + " cannot be recorded");
}

void note_written(nb::handle object, const char* name) {
  if (current != nullptr) current->note_written(object, name);
}

Program::~Program() {
  if (current == this) current = nullptr;
}

void Program::begin() {
  if (current != nullptr) runtime_error("this thread is recording already");
  if (state_ != State::kEmpty) runtime_error("a program is recorded once");
  state_ = State::kRecording;
  current = this;
}

void Program::end() {
  if (current != this) runtime_error("this thread does not record this program");
  check_written();
  if (!spoiled_.empty()) runtime_error(spoiled_);
  current = nullptr;
  state_ = State::kRecorded;
}

void Program::discard() {
  if (current != this) runtime_error("this thread does not record this program");
  current = nullptr;
  state_ = State::kDiscarded;
  calls_.clear();
  names_.clear();
  keep_.clear();
  workspaces_.clear();
  written_.clear();
}

Program::Running::Running(State& of) : state(of) {
  if (current != nullptr) runtime_error("a program cannot run while one is recorded");
  if (state != State::kRecorded) runtime_error("the program is not recorded, or runs already");
  state = State::kRunning;
}

void Program::run(int64_t* clock_ns) {
  const Running running(state_);
  nb::gil_scoped_release release;
  if (clock_ns != nullptr) *clock_ns++ = now_ns();
  for (const std::function<void()>& call : calls_) {
    call();
    if (clock_ns != nullptr) *clock_ns++ = now_ns();
  }
}

void Program::run_while(const std::function<bool()>& next) {
  const Running running(state_);
  nb::gil_scoped_release release;
  while (next())
    for (const std::function<void()>& call : calls_) call();
}

void Program::add_workspace(nb::handle array) {
  const Tensor t(array, "workspace");
  t.need_contiguous();
  workspaces_.push_back({t.data, t.data + t.size() * t.item_bytes()});
  keep_.push_back(nb::borrow(array));
}

void Program::add(std::string name, const nb::handle* keep, size_t n,
                  std::function<void()> call) {
  for (size_t i = 0; i < n; ++i) {
    const auto claimed = [&](const Written& w) { return w.object == keep[i].ptr(); };
    written_.erase(std::remove_if(written_.begin(), written_.end(), claimed), written_.end());
  }
  check_written();
  for (size_t i = 0; i < n; ++i)
    if (!keep[i].is_none() && !in_workspace(keep[i])) keep_.push_back(nb::borrow(keep[i]));
  calls_.push_back(std::move(call));
  names_.push_back(std::move(name));
}

void Program::note_written(nb::handle object, const char* name) {
  written_.push_back({object.ptr(), name});
}

void Program::check_written() {
  if (written_.empty()) return;
  spoil("'" + written_.front().name + "' was written by a call that was not recorded");
  written_.clear();
}

void Program::spoil(const std::string& why) {
  if (spoiled_.empty()) spoiled_ = why;
}

bool Program::in_workspace(nb::handle object) const {
  if (workspaces_.empty()) return false;
  try {
    const Tensor t(object, "array");
    return std::any_of(workspaces_.begin(), workspaces_.end(), [&](const Range& range) {
      return range.begin <= t.data && t.data < range.end;
    });
  } catch (const nb::builtin_exception&) {
    return false;  // no array, such as KVPools
  }
}

namespace {

void run(Program& program, nb::handle clock_ns) {
  if (clock_ns.is_none()) return program.run();
  const Tensor clock(clock_ns, "clock_ns", true);
  clock.need_dtype(DType::kI64).need_contiguous();
  clock.need_shape({static_cast<int64_t>(program.size()) + 1});
  program.run(clock.as<int64_t>());
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("begin", &Program::begin)
      .def("end", &Program::end)
      .def("discard", &Program::discard)
      .def("run", &run, nb::arg("clock_ns").none())
      .def_prop_ro("names", &Program::names)
      .def("add_workspace", &Program::add_workspace)
      .def_prop_ro("recorded", &Program::recorded)
      .def("__len__", &Program::size);
}

}  // namespace sps::bind
