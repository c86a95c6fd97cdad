// Finds the byte strings in a msgpack array (https://github.com/msgpack/msgpack/blob/master/spec.md). Does not
// copy them, and reads only their headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cpr {

struct Span {
  uint64_t offset, size;  // bytes, from the start of the array's encoding
};

// Returns the elements of an array of bin 8/16/32, or of fixstr and str 8/16/32 (as msgpack before 1.0 wrote bytes), in
// order. Throws std::invalid_argument if `data` is anything else or an element ends beyond `size`.
std::vector<Span> byte_string_spans(const uint8_t* data, size_t size);

}  // namespace cpr
