#include "reports.h"

#include <dlfcn.h>
#include <stdio.h>

#include <set>
#include <tuple>
#include <vector>

#include "../observer.h"

namespace emulation {
namespace {
constexpr size_t kMost = 200;
std::vector<std::string> lines;  // "kind \t what \t site \t offset in the library, or 0"
std::set<std::tuple<std::string, const void*, std::string>> known;

// The offset of an instruction in the file of its library, for addr2line.
uintptr_t offset_of(const void* caller) {
  Dl_info info;
  if (caller == nullptr || dladdr(caller, &info) == 0) return 0;
  return reinterpret_cast<uintptr_t>(caller) - reinterpret_cast<uintptr_t>(info.dli_fbase);
}
}  // namespace

void report(const char* kind, const std::string& what, const void* caller, const std::string& site) {
  // Without an instruction or a line the text tells reports apart.
  const bool placed = caller != nullptr || !site.empty();
  if (lines.size() >= kMost || !known.emplace(kind, caller, placed ? site : what).second) return;
  char offset[32];
  snprintf(offset, sizeof offset, "%lx", offset_of(caller));
  lines.push_back(std::string(kind) + "\t" + what + "\t" + site + "\t" + offset);
}

void observe_fault(const char* kind, const char* what, const void* caller) { report(kind, what, caller); }

void print_reports() {
  for (const std::string& line : lines) fprintf(stderr, "sanitizer: %s\n", line.c_str());
}

}  // namespace emulation

// Returns the reports since the last call, one a line.
extern "C" __attribute__((visibility("default"))) const char* sanitizer_reports() {
  static std::string text;
  text.clear();
  for (const std::string& line : emulation::lines) text += line + "\n";
  emulation::lines.clear();
  emulation::known.clear();
  return text.c_str();
}
