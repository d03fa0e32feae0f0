// Strict UTF-8 (RFC 3629): no surrogates, no overlong forms, nothing above U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace cpt::utf8 {

constexpr std::uint64_t kHighBits = 0x8080808080808080u;

inline std::uint64_t load8(const char* at) {
  std::uint64_t bytes;
  std::memcpy(&bytes, at, sizeof(bytes));
  return bytes;
}

// Bytes of the character that begins with this byte of valid UTF-8: 1 to 4.
inline std::size_t length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

// The character at `at` of valid UTF-8; moves `at` behind it.
inline char32_t decode(const char*& at) {
  const auto byte = [&at](int k) { return static_cast<char32_t>(static_cast<unsigned char>(at[k])); };
  const char32_t lead = byte(0);
  char32_t code;
  if (lead < 0x80) {
    code = lead;
    at += 1;
  } else if (lead < 0xE0) {
    code = (lead & 0x1F) << 6 | (byte(1) & 0x3F);
    at += 2;
  } else if (lead < 0xF0) {
    code = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    at += 3;
  } else {
    code = (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
    at += 4;
  }
  return code;
}

// Writes a character (no surrogate, at most U+10FFFF) to `out`, which has room for 4 bytes; returns its length.
inline std::size_t encode(char32_t code, char* out) {
  const auto put = [out](int k, char32_t byte) { out[k] = static_cast<char>(static_cast<unsigned char>(byte)); };
  if (code < 0x80) {
    put(0, code);
    return 1;
  }
  if (code < 0x800) {
    put(0, 0xC0 | code >> 6);
    put(1, 0x80 | (code & 0x3F));
    return 2;
  }
  if (code < 0x10000) {
    put(0, 0xE0 | code >> 12);
    put(1, 0x80 | (code >> 6 & 0x3F));
    put(2, 0x80 | (code & 0x3F));
    return 3;
  }
  put(0, 0xF0 | code >> 18);
  put(1, 0x80 | (code >> 12 & 0x3F));
  put(2, 0x80 | (code >> 6 & 0x3F));
  put(3, 0x80 | (code & 0x3F));
  return 4;
}

inline void append(std::string& out, char32_t code) {
  char bytes[4];
  out.append(bytes, encode(code, bytes));
}

// Length of the valid character of two or more bytes at `at`, or 0 where there is none.
inline std::size_t valid_sequence(const char* at, const char* end) {
  const auto byte = [at](int k) { return static_cast<unsigned>(static_cast<unsigned char>(at[k])); };
  const auto follows = [&byte](int k) { return (byte(k) & 0xC0) == 0x80; };
  const std::ptrdiff_t room = end - at;
  const unsigned lead = byte(0);
  if ((lead & 0xF0) == 0xE0) {
    if (room < 3 || !follows(1) || !follows(2)) return 0;
    const unsigned code = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6;
    return code >= 0x800 && (code & 0xF800) != 0xD800 ? 3 : 0;
  }
  if (lead >= 0xC2 && lead < 0xE0) return room >= 2 && follows(1) ? 2 : 0;
  if (lead >= 0xF0 && lead < 0xF5) {
    if (room < 4 || !follows(1) || !follows(2) || !follows(3)) return 0;
    const unsigned code = (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12;
    return code >= 0x10000 && code < 0x110000 ? 4 : 0;
  }
  return 0;
}

constexpr std::ptrdiff_t kStride = 64;

inline bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

// Whether none of the 64 bytes at `text` is wrong behind the three before it, which must be there. Each byte is
// judged alone, so that the compiler can judge as many at a time as a register holds.
inline bool stride_is_valid(const char* text) {
  const auto* at = reinterpret_cast<const unsigned char*>(text);
  unsigned char wrong = 0;
  for (std::ptrdiff_t k = 0; k < kStride; ++k) {
    const unsigned char now = at[k], first = at[k - 1], second = at[k - 2], third = at[k - 3];
    const unsigned char continues = (now & 0xC0) == 0x80;
    const unsigned char must = (first >= 0xC0) | (second >= 0xE0) | (third >= 0xF0);
    const unsigned char never = ((now & 0xFE) == 0xC0) | (now >= 0xF5);
    const unsigned char overlong = ((first == 0xE0) & (now < 0xA0)) | ((first == 0xF0) & (now < 0x90));
    const unsigned char too_high = ((first == 0xED) & (now >= 0xA0)) | ((first == 0xF4) & (now >= 0x90));
    wrong = static_cast<unsigned char>(wrong | (continues ^ must) | never | overlong | too_high);
  }
  return wrong == 0;
}

inline bool stride_is_ascii(const char* at) {
  std::uint64_t all = 0;
  for (std::ptrdiff_t k = 0; k < kStride; k += 8) all |= load8(at + k);
  return (all & kHighBits) == 0;
}

// Bytes of the longest prefix that is valid: all of them where the text is.
inline std::size_t valid_prefix(std::string_view text) {
  const char* const begin = text.data();
  const char* const end = begin + text.size();
  const char* at = begin;
  bool strides = text.size() > 2 * kStride;
  while (at < end) {
    if (strides && at - begin >= 3) {
      strides = false;
      while (end - at >= kStride && ((stride_is_ascii(at) && static_cast<unsigned char>(at[-1]) < 0x80) || stride_is_valid(at))) at += kStride;
      do --at;
      while (is_continuation(*at));  // to the last character, which may be cut
    }
    if (static_cast<unsigned char>(*at) < 0x80) {
      at += end - at >= 8 && (load8(at) & kHighBits) == 0 ? 8 : 1;
    } else {
      const std::size_t size = valid_sequence(at, end);
      if (size == 0) break;
      at += size;
    }
  }
  return static_cast<std::size_t>(at - begin);
}

inline bool valid(std::string_view text) { return valid_prefix(text) == text.size(); }

// Characters (code points) of valid UTF-8.
inline std::size_t count(std::string_view text) {
  std::size_t characters = 0;
  for (const char byte : text) characters += !is_continuation(byte);
  return characters;
}

// Whether str.strip() of Python takes this character for white space.
inline bool is_space(char32_t code) {
  if (code < 0x80) return code == ' ' || (code >= 0x09 && code <= 0x0D) || (code >= 0x1C && code <= 0x1F);
  return code == 0x85 || code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
         code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

}  // namespace cpt::utf8
