// Names of the kernels and sizes of their static shared memory, from the symbols of this library: a
// `__shared__` variable of a function is a local static here, and is named after the function.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>

#include "machine.h"

namespace emulation {
namespace {

struct Symbols {
  std::map<uintptr_t, std::string> functions;  // address of the function: mangled name
  std::multimap<std::string, size_t> statics;  // mangled name of a local static: bytes

  Symbols() {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&kernel_at), &self);
    std::ifstream file(self.dli_fname, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.size() < sizeof(Elf64_Ehdr)) return;
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
      const auto* symbol = reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
      for (size_t n = sections[i].sh_size / sizeof(Elf64_Sym); n > 0; --n, ++symbol) {
        const std::string name = names + symbol->st_name;
        const int type = ELF64_ST_TYPE(symbol->st_info);
        if (type == STT_FUNC && name.rfind("_Z", 0) == 0) {
          functions[reinterpret_cast<uintptr_t>(self.dli_fbase) + symbol->st_value] = name;
        } else if (type == STT_OBJECT && name.rfind("_ZZ", 0) == 0) {
          statics.emplace(name, symbol->st_size);
        }
      }
    }
  }
};

// `head_forward<float, true>` of `void d2ext::(anonymous namespace)::head_forward<float, true>(...)`.
std::string short_name(const std::string& mangled) {
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, nullptr);
  if (text == nullptr) return mangled;
  std::string name = text;
  std::free(text);
  for (const std::string part : {"(anonymous namespace)::", "d2ext::", "c10::", "void "}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, part.size());
  }
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace

const Kernel& kernel_at(const void* function) {
  static const Symbols symbols;
  static std::map<const void*, Kernel> known;
  const auto place = known.find(function);
  if (place != known.end()) return place->second;
  Kernel kernel;
  const auto found = symbols.functions.find(reinterpret_cast<uintptr_t>(function));
  if (found != symbols.functions.end()) {
    kernel.name = short_name(found->second);
    const std::string prefix = "_ZZ" + found->second.substr(2) + "E";
    for (const auto& [name, size] : symbols.statics) {
      if (name.rfind(prefix, 0) == 0) kernel.shared_bytes += size;
    }
  }
  return known[function] = kernel;
}

}  // namespace emulation
