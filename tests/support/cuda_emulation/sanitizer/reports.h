// What the sanitizer found. Reports of the same kind at the same instruction are one.
#pragma once

#include <string>

namespace emulation {

// caller: the return address of the access, which the tests turn into a file and a line; or null.
void report(const char* kind, const std::string& what, const void* caller, const std::string& site = "");

}  // namespace emulation
