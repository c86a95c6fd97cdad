#include "msgpack.h"

#include <stdexcept>
#include <string>

namespace cpr {

namespace {

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  // Returns the number of elements of the array that begins here.
  uint64_t array() {
    const uint8_t type = byte();
    if ((type & 0xf0) == 0x90) return type & 0x0f;  // fixarray
    if (type == 0xdc) return big_endian(2);
    if (type == 0xdd) return big_endian(4);
    throw std::invalid_argument("expected a msgpack array, got type byte " + std::to_string(type));
  }

  Span byte_string() {
    const size_t begin = at_;
    const uint8_t type = byte();
    uint64_t length;
    if ((type & 0xe0) == 0xa0)
      length = type & 0x1f;  // fixstr
    else if (type == 0xc4 || type == 0xd9)
      length = big_endian(1);
    else if (type == 0xc5 || type == 0xda)
      length = big_endian(2);
    else if (type == 0xc6 || type == 0xdb)
      length = big_endian(4);
    else
      throw std::invalid_argument("expected msgpack bytes at byte " + std::to_string(begin) + ", got type byte " +
                                  std::to_string(type));
    const Span span{at_, length};
    if (length > size_ - at_) throw std::invalid_argument(cut(begin));
    at_ += length;
    return span;
  }

 private:
  uint8_t byte() {
    if (at_ == size_) throw std::invalid_argument(cut(at_));
    return data_[at_++];
  }

  uint64_t big_endian(int bytes) {
    uint64_t value = 0;
    while (bytes--) value = value << 8 | byte();
    return value;
  }

  std::string cut(size_t begin) const {
    return "the element at byte " + std::to_string(begin) + " reaches beyond the " + std::to_string(size_) +
           " bytes there are";
  }

  const uint8_t* data_;
  size_t size_, at_ = 0;
};

}  // namespace

std::vector<Span> byte_string_spans(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  const uint64_t count = reader.array();
  if (count > size)
    throw std::invalid_argument("an array of " + std::to_string(count) + " elements does not fit " +
                                std::to_string(size) + " bytes");
  std::vector<Span> spans;
  spans.reserve(count);
  for (uint64_t i = 0; i < count; ++i) spans.push_back(reader.byte_string());
  return spans;
}

}  // namespace cpr
