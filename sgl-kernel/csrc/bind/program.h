// Recorded programs: kernel calls kept with their arguments and run again by one native call, as
// CUDA graphs do for GPUs. While a program records on a thread, every call that goes through
// `submit` on that thread runs and is appended.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "bind/tensor.h"

namespace sps::bind {

class Program {
 public:
  Program() = default;
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // Starts recording on the calling thread. Throws where that thread records already, or this
  // program was recorded before.
  void begin();
  // Ends recording. Throws, and the program stays empty, when something that ran meanwhile could
  // not be recorded.
  void end();
  // Ends a recording that failed; the program stays empty for good.
  void discard();
  // Runs everything with the GIL released. Throws what a call throws; calls after it do not run.
  // clock_ns: null, or where to put the monotonic clock before the first and after each call.
  void run(int64_t* clock_ns = nullptr);
  // Runs everything as long as `next` says so, which is asked before each time; both without the
  // GIL. Throws what a call or `next` throws.
  void run_while(const std::function<bool()>& next);
  // Arrays inside `array` are not kept one by one: the program keeps all of it.
  void add_workspace(nb::handle array);

  size_t size() const { return calls_.size(); }
  const std::vector<std::string>& names() const { return names_; }
  bool recorded() const { return state_ == State::kRecorded; }

  // For `submit` and `Tensor`.
  void add(std::string name, const nb::handle* keep, size_t n, std::function<void()> call);
  void note_written(nb::handle object, const char* name);
  void spoil(const std::string& why);

 private:
  enum class State { kEmpty, kRecording, kRecorded, kRunning, kDiscarded };
  // The state while something runs. Throws where it may not.
  struct Running {
    explicit Running(State& state);
    ~Running() { state = State::kRecorded; }
    State& state;
  };
  struct Written {
    PyObject* object;
    std::string name;
  };
  struct Range {
    const char *begin, *end;
  };

  bool in_workspace(nb::handle object) const;
  void check_written();

  State state_ = State::kEmpty;
  std::vector<std::function<void()>> calls_;
  std::vector<std::string> names_;  // of calls
  std::vector<nb::object> keep_;
  std::vector<Range> workspaces_;
  std::vector<Written> written_;  // seen as outputs, not yet claimed by a recorded call
  std::string spoiled_;           // why this recording is worth nothing
};

// The program that records on this thread, or null.
Program* recording();

// For calls whose result is a value, not an array: what this thread records meanwhile is void.
void refuse_recording(const char* what);

// Runs `kernel()` with the GIL released and, while this thread records, appends it. `kernel` holds
// its arguments by value; `keep` names every object whose memory they point to (None is left out);
// `name` is what profiles of the program call it.
template <class F>
void submit(std::string name, const nb::handle* keep, size_t n, F&& kernel) {
  {
    nb::gil_scoped_release release;
    kernel();
  }
  if (Program* program = recording())
    program->add(std::move(name), keep, n, std::function<void()>(std::forward<F>(kernel)));
}

template <class F>
void submit(std::string name, std::initializer_list<nb::handle> keep, F&& kernel) {
  submit(std::move(name), keep.begin(), keep.size(), std::forward<F>(kernel));
}

template <class F>
void submit(std::string name, const std::vector<nb::handle>& keep, F&& kernel) {
  submit(std::move(name), keep.data(), keep.size(), std::forward<F>(kernel));
}

}  // namespace sps::bind
